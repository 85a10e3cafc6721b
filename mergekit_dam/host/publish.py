"""A finished model takes its place: the folder that it replaces is whole until then.

Where there is a folder, it is moved aside and the new one takes its name; a reader finds the old
model or the new one. A folder that cannot be moved (a mount point, the working directory) is
emptied and filled in an order in which no reader finds parts of both: what says which weights there
are goes first and comes last.
"""

import fnmatch
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from mergekit_dam.errors import DamError, listed
from mergekit_dam.host.workplace import PREVIOUS, SCRATCH
from mergekit_dam.lock.folder import TRACKED
from mergekit_dam.stored import sync

_OF_A_MERGE = ("mergekit_config.yml", "dam_report.json", "dam_coefficients.safetensors")
"""Files by one of which a folder is known to hold a merged model."""

_ENTRIES = ("config.json", "*.index.json")
"""Files that a reader opens first: that of the model, then that of its weights."""

_OF_A_MODEL = (
    *_OF_A_MERGE,
    *_ENTRIES,
    "model*.safetensors",
    "pytorch_model*.bin",
    "dam_corrections.safetensors",
    "dam_report.html",
    "dam_coefficients.svg",
    "dam_lock.json",
    TRACKED,
    "*_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "README.md",
    f"{SCRATCH}*",
)
"""Files that a merge may have written; others are the user's own, and are kept."""


def check_replaceable(output: Path) -> None:
    """Refuse an output folder whose files are no merge's, or that is no folder.

    Args:
        output: folder of the merged model, resolved.

    Raises:
        DamError: the message says what is in the way.
    """
    above = next((path for path in output.parents if path.exists()), output)
    for path in (output, above):
        if path.exists() and not path.is_dir():
            raise DamError(f"{output}: required a folder, but {path} is a file; name another one")
    if not output.is_dir() or any((output / name).exists() for name in _OF_A_MERGE):
        return
    found = sorted(
        path.name
        for path in output.iterdir()
        if _is_any(path, _OF_A_MODEL) and not path.name.startswith(SCRATCH)
    )
    if found:
        raise DamError(
            f"{output}: required a new folder, an empty one or that of an earlier merge, got one "
            f"that holds {listed(found)} and no mergekit_config.yml; move these files away, or "
            f"name another folder"
        )


def publish(new: Path, output: Path, place: Path) -> None:
    """Move a finished model to its place; files of the user's own that are there are kept.

    Args:
        new: folder of the finished model, in its workplace; it is gone afterwards.
        output: folder of the merged model, resolved.
        place: the workplace.
    """
    for path in new.glob(f"{SCRATCH}*"):  # of objects that are not collected yet
        _remove(path)
    for path in (*new.rglob("*"), new):
        sync(path)
    if not output.exists():
        new.rename(output)
    elif not (_can_be_moved(output, new, place) and _swapped(new, output, place / PREVIOUS)):
        _fill(new, output)
        sync(output)
    sync(output.parent)


def _swapped(new: Path, output: Path, previous: Path) -> bool:
    """Let the new folder take the old one's name; False, and nothing changed, if that fails."""
    shutil.copymode(output, new)
    linked: list[Path] = []
    try:
        output.rename(previous)
        for entry in _kept(previous, new):
            linked.append(new / entry.name)
            _link(entry, linked[-1])
        new.rename(output)
    except BaseException as error:
        if previous.exists() and not output.exists():
            previous.rename(output)
        for path in linked:
            _remove(path)
        if isinstance(error, OSError):
            return False
        raise
    return True


def _fill(new: Path, output: Path) -> None:
    """Replace the files of a folder one by one; it can be told to be a merge's all the time."""
    of_a_model = [path for path in output.iterdir() if _is_any(path, _OF_A_MODEL)]
    old = [path for path in of_a_model if not new.is_relative_to(path)]
    for path in sorted(old, key=_entry, reverse=True):
        if _entry(path):
            _remove(path)
    coming = list(new.iterdir())
    for path in coming:
        if _is_any(path, _OF_A_MERGE):
            shutil.move(path, output / path.name)
    for path in old:
        if not (_is_any(path, _OF_A_MERGE) and any(path.name == own.name for own in coming)):
            _remove(path)
    for path in sorted(new.iterdir(), key=_entry):
        shutil.move(path, output / path.name)


def _kept(old: Path, new: Path) -> Iterable[Path]:
    """Files and folders of the user's own that are in the old folder and not in the new one."""
    for entry in sorted(old.iterdir()):
        if not _is_any(entry, _OF_A_MODEL) and not os.path.lexists(new / entry.name):
            yield entry


def _link(source: Path, target: Path) -> None:
    """Give a file, or all files of a folder, a second name: the first one stays until the end."""
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        shutil.copytree(source, target, symlinks=True, copy_function=os.link)
    else:
        target.hardlink_to(source)


def _entry(path: Path) -> int:
    """How early a reader opens a file; 0 for all that the entries lead to."""
    return next((2 - k for k, name in enumerate(_ENTRIES) if fnmatch.fnmatch(path.name, name)), 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _can_be_moved(output: Path, new: Path, place: Path) -> bool:
    """Whether a folder can be replaced by another one without a trace."""
    own, other = output.stat(), new.stat()
    return (
        place.parent == output.parent
        and (own.st_uid, own.st_gid) == (other.st_uid, other.st_gid)
        and not Path.cwd().is_relative_to(output)  # a shell would stay in the old one
    )


def _is_any(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
