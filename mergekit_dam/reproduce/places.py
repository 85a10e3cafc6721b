"""Where the models and texts of a lock are now."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from mergekit_dam.digests import sha256_of
from mergekit_dam.errors import DamError, listed
from mergekit_dam.lock.schema import Lock, Origin
from mergekit_dam.untrusted import exists

_ABOVE = 3
"""How many folders above that of the lock are looked at: the configuration may be in one."""


@dataclass(frozen=True)
class Places:
    """Where local files are looked for.

    Attributes:
        roots: Folders that names are relative to, in this order.
        moved: Name -> the path that it has now.
    """

    roots: Sequence[Path]
    moved: Mapping[str, Path]

    @classmethod
    def of(cls, lock_folder: Path, given: Sequence[str]) -> "Places":
        """The places of a lock.

        Args:
            lock_folder: Folder of the lock.
            given: Folders, or `NAME=PATH`, which the user named.

        Raises:
            DamError: One of them is not there.
        """
        moved, roots = {}, []
        for text in given:
            name, separator, path = text.partition("=")
            place = Path(path if separator and not exists(text) else text)
            if not exists(place):
                raise DamError(f"--models {text}: required a folder, or NAME=FOLDER; none is there")
            if place == Path(text):
                roots.append(place)
            else:
                moved[name] = place
        above = [lock_folder, *lock_folder.parents][: _ABOVE + 1]
        return cls([*roots, *above, Path.cwd()], moved)

    def of_name(self, name: str) -> Iterator[Path]:
        """The places that a name may mean and where there is something."""
        if name in self.moved:
            yield self.moved[name]
            return
        last = PurePath(name).name
        tried = (root / end for root in self.roots for end in dict.fromkeys((name, last)))
        yield from (Path(os.path.normpath(path)) for path in tried if exists(path))


def found_models(lock: Lock, places: Places) -> dict[str, str]:
    """Every model and adapter of a lock by name -> what to write in its place in a configuration.

    Repositories get their commit, and folders have to have the files of the lock.

    Raises:
        DamError: A model is not there, or not the one of the lock; all problems are named.
    """
    found, problems = {}, []
    for origin in origins(lock):
        if origin.repository is not None:
            commit = "" if origin.revision is None else f"@{origin.revision}"
            found[origin.name] = f"{origin.repository}{commit}"
            continue
        candidates = list(places.of_name(origin.name))
        fitting = next((path for path in candidates if not _problems(origin, path)), None)
        if fitting is not None:
            found[origin.name] = str(fitting)
        elif candidates:
            problems += _problems(origin, candidates[0])
        else:
            problems.append(
                f"{origin.name}: found at none of {listed(places.roots, 6)}; name the folder "
                f"that holds it, or itself: --models {origin.name}=PATH"
            )
    if problems:
        raise DamError("models of the lock:\n" + "\n".join(f"  - {own}" for own in problems))
    return found


def origins(lock: Lock) -> Iterator[Origin]:
    """All models and adapters of a lock."""
    for source in lock.sources:
        yield source.model
        if source.adapter is not None:
            yield source.adapter


def _problems(origin: Origin, folder: Path) -> list[str]:
    """What differs between a folder and the files of a lock."""
    name = origin.name
    found = []
    for file, locked in origin.files.items():
        path = folder / file
        if not path.is_file():
            found.append(f"{name}: {file} is missing in {folder}")
        elif (own := sha256_of(path)) != locked:
            found.append(
                f"{name}: {file} in {folder} has sha256 {own[:12]}, in the lock {locked[:12]}; "
                f"required the model of the merge"
            )
    return found
