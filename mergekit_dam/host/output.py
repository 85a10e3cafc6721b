"""The output folder: what an interrupted merge has half written is removed."""

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRATCH = ".dam-"
"""Beginning of the names of folders that do not outlive a merge."""


@contextmanager
def output_folder(out_path: Path, *, written: bool) -> Iterator[Path]:
    """Where a merge goes: to its folder, or to one that is thrown away."""
    if written:
        with no_half_written_model(out_path):
            yield out_path
        return
    beside = out_path.absolute().parent  # the fit needs a disk with room, as that one has
    with (
        _terminable(),
        tempfile.TemporaryDirectory(
            prefix=SCRATCH, dir=beside if beside.is_dir() else None
        ) as folder,
    ):
        yield Path(folder)


@contextmanager
def no_half_written_model(out_path: Path) -> Iterator[None]:
    """Remove what an interrupted merge wrote, and the folder if it made it."""
    existed = out_path.is_dir()
    before = set(out_path.iterdir()) if existed else set()
    with _terminable() as uninterrupted:
        try:
            yield
        except BaseException:
            uninterrupted()
            for entry in set(out_path.iterdir()) - before if out_path.is_dir() else ():
                if entry.is_file():
                    entry.unlink()
                elif entry.name.startswith(SCRATCH):
                    shutil.rmtree(entry)
            if not existed and out_path.is_dir() and not any(out_path.iterdir()):
                out_path.rmdir()
            raise


@contextmanager
def _terminable() -> Iterator[Callable[[], None]]:
    """Have SIGTERM end the process the way ctrl-c does, through everything that cleans up.

    torchrun sends it to the processes of a merge when one of them has stopped.

    Yields:
        What has SIGTERM ignored from then on.
    """
    stock = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or stock != signal.SIG_DFL:
        yield lambda: None
        return

    def stop(number: int, _: Any) -> None:
        ignore()
        raise SystemExit(128 + number)

    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield ignore
    finally:
        signal.signal(signal.SIGTERM, stock)
