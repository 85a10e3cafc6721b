"""A Hub on this machine: the part of its API that models are read by, and a count of bytes."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "c0ffee" + 34 * "0"

_API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+?)(?:/(?P<what>revision|tree|paths-info)/.*)?$")
_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)$")


@dataclass
class Hub:
    """A running server.

    Attributes:
        url: its address, for `HF_ENDPOINT`.
        models: id -> folder.
        sent: bytes of the content of each file that were sent, by id and name.
    """

    url: str
    models: Mapping[str, Path]
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that asks this Hub, with a cache of its own."""
        return {**os.environ, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


@contextmanager
def local_hub(models: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve folders as models of the Hub."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, hub)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}", models)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def run_command(environment: Mapping[str, str], folder: Path, *words: str) -> str:
    """What `mergekit-dam` prints in a process of its own; it has to end well."""
    done = subprocess.run(
        [sys.executable, "-c", "from mergekit_dam.cli import main; main()", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    path = urlsplit(request.path).path
    asked = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    if (found := _FILE.match(path)) and found["id"] in hub.models:
        _send_file(request, hub, found["id"], found["file"])
    elif (found := _API.match(path)) and found["id"] in hub.models:
        folder = hub.models[found["id"]]
        if found["what"] == "tree":
            _send_json(request, _entries(folder))
        elif found["what"] == "paths-info":
            wanted = json.loads(asked)["paths"] if asked[:1] == b"{" else _form(asked)
            _send_json(request, [entry for entry in _entries(folder) if entry["path"] in wanted])
        else:
            siblings = [{"rfilename": entry["path"]} for entry in _entries(folder)]
            _send_json(request, {"id": found["id"], "sha": COMMIT, "siblings": siblings})
    else:
        _send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})


def _form(asked: bytes) -> list[str]:
    return parse_qs(asked.decode())["paths"]


def _entries(folder: Path) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _tag(file)}
        for file in sorted(folder.iterdir())
    ]


def _tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _send_file(request: BaseHTTPRequestHandler, hub: Hub, model: str, name: str) -> None:
    file = hub.models[model] / name
    if not file.is_file():
        _send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return
    content, status = file.read_bytes(), 200
    headers = {"ETag": f'"{_tag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
    part = re.match(r"bytes=(\d+)-(\d*)$", request.headers.get("Range") or "")
    if part:
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        content, status = content[first : last + 1], 206
    if request.command == "GET":
        hub.sent[model, name] += len(content)
    _send(request, status, content, headers)


def _send_json(request: BaseHTTPRequestHandler, value: Any) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _send(
    request: BaseHTTPRequestHandler, status: int, content: bytes, headers: Mapping[str, str]
) -> None:
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
