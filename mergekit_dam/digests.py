"""sha256 of files: each is read once in a process, beside other work where that is asked for."""

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_PIECE = 2**22
"""Bytes that are read at a time."""

_AT_ONCE = min(4, os.cpu_count() or 1)
"""Files that are read at the same time."""

_BLOB = re.compile(r"[0-9a-f]{64}")

_Key = tuple[str, int, int]
_found: dict[_Key, "Future[str]"] = {}
"""Digests by path, size and time of change: a file that was written again is read again."""


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file.

    The large files of the Hub's cache are named by their sha256 and are not read.

    Raises:
        OSError: The file cannot be read.
    """
    name = _name_in_cache(path)
    if name is not None:
        return name
    key = _key(path)
    under_way = _found.get(key)
    if under_way is None or under_way.cancelled():
        under_way = _found[key] = Future()
        try:
            under_way.set_result(_read(path, threading.Event()))
        except OSError:
            del _found[key]
            raise
    return under_way.result()


@contextmanager
def hashed_ahead(paths: Iterable[Path]) -> Iterator[None]:
    """Hash files in threads while the body runs; `sha256_of` waits for those that it asks for."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(_AT_ONCE, "sha256")
    begun: dict[_Key, Future[str]] = {}
    for path in paths:
        key = _key(path)
        if _name_in_cache(path) is None and key not in _found:
            begun[key] = _found[key] = pool.submit(_read, path, stop)
    try:
        yield
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        for key, future in begun.items():
            if future.cancelled() or future.exception() is not None:
                _found.pop(key, None)


def sha256_from(path: Path, offset: int) -> str:
    """Hex sha256 of a file's bytes from an offset on."""
    return _read(path, threading.Event(), offset)


def sha256_of_text(text: str) -> str:
    """Hex sha256 of a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


class _StoppedError(Exception):
    """The digest is not needed any more."""


def _key(path: Path) -> _Key:
    real = path.resolve()
    status = real.stat()
    return str(real), status.st_size, status.st_mtime_ns


def _name_in_cache(path: Path) -> str | None:
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and _BLOB.fullmatch(real.name) else None


def _read(path: Path, stop: threading.Event, offset: int = 0) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE):
            if stop.is_set():
                raise _StoppedError
            digest.update(piece)
    return digest.hexdigest()
