"""The output folder, and the removal of files that an interrupted merge left half written."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_dam.interrupts import terminable

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
        terminable(),
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
    with terminable() as uninterrupted:
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
