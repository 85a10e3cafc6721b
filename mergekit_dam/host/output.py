"""The output folder, and the removal of files that an interrupted merge left half written."""

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRATCH = ".dam-"
"""Prefix of the names of temporary folders, which a merge removes at its end."""


@contextmanager
def output_folder(out_path: Path, *, written: bool) -> Iterator[Path]:
    """The folder that a merge writes to: its own, or a temporary one that is removed afterwards.

    Args:
        out_path: folder of the merged model.
        written: whether this process writes the merged model.
    """
    if written:
        with no_half_written_model(out_path):
            yield out_path
        return
    beside = out_path.absolute().parent  # the disk of the output has room for hidden states
    with (
        _terminable(),
        tempfile.TemporaryDirectory(
            prefix=SCRATCH, dir=beside if beside.is_dir() else None
        ) as folder,
    ):
        yield Path(folder)


@contextmanager
def no_half_written_model(out_path: Path) -> Iterator[None]:
    """Remove the files of an interrupted merge, and the folder if the merge created it."""
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
    """Make SIGTERM end the process as ctrl-c does, so that all clean-up code runs.

    torchrun sends SIGTERM to the processes of a merge when one of them has stopped.

    Yields:
        A function that makes the process ignore SIGTERM from then on.
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
