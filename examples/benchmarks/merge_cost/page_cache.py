"""The page cache, emptied of some files."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from mergekit_dam.errors import DamError


def drop(folders: Iterable[str]) -> None:
    """Have the next reader of anything in these folders read it from storage.

    Whatever is no folder here, such as the name of a model on the Hub, is left alone.

    Raises:
        DamError: if the system cannot be told to.
    """
    if sys.platform != "linux":
        raise DamError("--cold: only Linux can be told to drop files from its page cache")
    for file in (file for folder in folders for file in Path(folder).rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
