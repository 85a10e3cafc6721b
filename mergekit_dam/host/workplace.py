"""The folder in which one merge works until its model is whole: locked, and removed at its end.

There is one for every output, `.dam-NAME` beside it, so that a merge finds there what an earlier
one to the same place has left when it was killed. The lock is the system's: it goes with the
process that holds it. What a merge keeps for the next run (`KEPT`) stays, if it ends before its
model is whole.
"""

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mergekit_dam.errors import DamError
from mergekit_dam.stored import folder_bytes
from mergekit_dam.tables import size

LOG = logging.getLogger(__name__)

SCRATCH = ".dam-"
"""Prefix of the names of temporary folders, which a merge removes at its end."""

PREVIOUS = "previous"
"""Name, in a workplace, of the folder that the merged model replaces."""

KEPT = "kept"
"""Name, in a workplace, of the folder with the states from which the next run continues."""

_LOCK, _OWNER = "lock", "owner"


def place_for(output: Path) -> Path:
    """Where a merge to a folder works: beside it, or in it where nothing can be moved there.

    Args:
        output: folder of the merged model, resolved.
    """
    apart = os.path.ismount(output) or not os.access(_existing(output.parent), os.W_OK)
    return (output if output.is_dir() and apart else output.parent) / f"{SCRATCH}{output.name}"


@contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """Lock the workplace of an output, put right what a killed merge has left, and clean up.

    Where the body fails, what is worth continuing stays, and a line of the log says so.

    Args:
        output: folder of the merged model, resolved. It need not exist.

    Yields:
        A folder that is empty but for its lock, and for what an earlier merge has kept.

    Raises:
        DamError: another merge works there, or nothing can be written; the message says who, or
            why.
    """
    place = place_for(output)
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        lock = _locked(place, output)
        try:
            _recover(place, output)
            owner = f"process {os.getpid()} on {socket.gethostname()}"
            (place / _OWNER).write_text(owner, encoding="utf-8")
            yield place
        except BaseException:
            _leave(place)
            raise
        else:
            shutil.rmtree(place, ignore_errors=True)
        finally:
            lock.release()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds the merged model
                folder.rmdir()


def _locked(place: Path, output: Path) -> FileLock:
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(place)
        lock = FileLock(place / _LOCK, timeout=0.5)  # a while, since its last holder may remove it
        lock.acquire()
    except Timeout as error:
        raise DamError(
            f"{output}: another merge to this folder is under way ({_owner(place)}); wait for its "
            f"end, or name another folder"
        ) from error
    except OSError as error:
        raise DamError(
            f"{output}: required an output folder that can be written, but {place} cannot "
            f"({error.strerror or error}); check its permissions, or name another folder"
        ) from error
    return lock


def _require_own(place: Path) -> None:
    """Refuse a workplace that somebody else has made: a merge would go on from what is in it.

    Raises:
        DamError: It is a link, or of another user.
    """
    if place.is_symlink() or (os.name == "posix" and place.stat().st_uid != os.getuid()):
        raise DamError(
            f"{place}: required a folder of the user who merges, got a link or the folder of "
            f"another user; delete it, or name another output"
        )


def _owner(place: Path) -> str:
    try:
        return (place / _OWNER).read_text("utf-8")
    except OSError:
        return "it has just begun"


def _recover(place: Path, output: Path) -> None:
    """Remove what a killed merge has left; a model that it had moved out of the way comes back."""
    previous = place / PREVIOUS
    if previous.exists() and not output.exists():
        LOG.warning("%s: an earlier merge was killed; its predecessor is put back", output)
        previous.rename(output)
    _empty(place)


def _leave(place: Path) -> None:
    """Remove all but what the next run can continue from; all of it if there is nothing."""
    kept = place / KEPT
    if not any(kept.glob("*.safetensors")):
        shutil.rmtree(place, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        _empty(place)
    LOG.warning(
        "what is done is kept in %s (%s); the same command continues; delete the folder if you do "
        "not want that",
        place,
        size(folder_bytes(kept)),
    )


def _empty(place: Path) -> None:
    """Remove all but the lock, and what is kept for the next run."""
    for entry in place.iterdir():
        if entry.name in (_LOCK, KEPT):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
