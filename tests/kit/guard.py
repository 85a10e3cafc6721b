"""A guard around a reader of files that others wrote: how it may fail, and what it may touch."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
import torch

from mergekit_dam.errors import DamError

SECONDS = {signal.ITIMER_PROF: 10, signal.ITIMER_REAL: 100}
"""How long a reader may compute for a small file, and how long it may take on a busy machine."""

MEMORY = 2 << 30
"""Bytes of address space that a reader may take."""

_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "socket.getaddrinfo")
_OF_THE_INSTALLATION = tuple(
    dict.fromkeys(
        [
            *(os.path.realpath(own) for own in (sys.prefix, sys.base_prefix, torch.__path__[0])),
            *(os.path.realpath(own) for own in sys.path if own),
            str(Path(__file__).parents[2] / "mergekit_dam"),
            "/proc",
            "/sys",
            "/dev",
            "/usr/share/zoneinfo",
        ]
    )
)

_watched: list[tuple[str, list[str]]] = []
"""The folder under watch, and what was touched outside of it."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    folder, touched = _watched[-1]
    if event in _NEVER:
        touched.append(f"{event} {arguments!r:.200}")
    elif event in _WRITES and not _inside(arguments[0], (folder,)):
        touched.append(f"{event} {arguments[0]!r:.200}")
    elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _, mode, flags = arguments
        writes = any(own in mode for own in "wxa+") if mode else bool(flags & 3)
        allowed = (folder,) if writes else (folder, *_OF_THE_INSTALLATION)
        if not _inside(arguments[0], allowed):
            touched.append(f"open {arguments[0]!r:.200} ({mode or flags})")


def _inside(path: Any, folders: tuple[str, ...]) -> bool:
    try:
        real = os.path.realpath(os.fsdecode(path))
    except ValueError:  # a NUL byte: nothing is opened
        return True
    return any(real == own or real.startswith(own.rstrip("/") + "/") for own in folders)


sys.addaudithook(_hook)  # it stays, and does nothing where nothing is watched


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _bounded_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done in time: {SECONDS}")

    before = {own: signal.signal(own, late) for own in (signal.SIGPROF, signal.SIGALRM)}
    for timer, seconds in SECONDS.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in SECONDS:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def guarded() -> Iterator[Path]:
    """Assert that the body works or raises one of our errors, soon, in its folder alone.

    Usage errors of click count as ours.

    Yields:
        An empty folder, which is also the working directory and that of temporary files. Nothing
        else may be written, and nothing else but what is installed may be read.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = os.path.realpath(made)
        touched: list[str] = []
        said = "it works"
        elsewhere, tempfile.tempdir = tempfile.tempdir, folder
        with _bounded_memory(), _bounded_time():
            before = Path.cwd()
            os.chdir(folder)
            _watched.append((folder, touched))
            try:
                yield Path(folder)
            except (DamError, click.UsageError) as error:
                said = error.message
            finally:
                _watched.pop()
                os.chdir(before)
                tempfile.tempdir = elsewhere
        assert not touched, touched
        assert said.strip()
