"""Names of local files and folders that mean the same on any machine.

What a merge writes is for others to read: no path of the machine stands in it. A path is named
relative to the folder of the configuration file, and one that shares no folder with it by the end
of the path.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from mergekit.common import ModelReference

from mergekit_dam.calibration.source import OPTION
from mergekit_dam.request.check import Checked


@dataclass(frozen=True)
class Naming:
    """How paths are named in a merge.

    Attributes:
        folder: the folder of the configuration file; None if it came from no file.
        given: names that paths have already, such as those of an earlier merge.
    """

    folder: Path | None = None
    given: Mapping[str, str] = field(default_factory=dict)


_NAMING: ContextVar[Naming | None] = ContextVar("naming", default=None)


@contextmanager
def naming(folder: Path | None, given: Mapping[str, str] | None = None) -> Iterator[None]:
    """Say for the merges of the body how paths are named; mergekit hands on no file's name."""
    token = _NAMING.set(Naming(folder, given or {}))
    try:
        yield
    finally:
        _NAMING.reset(token)


@dataclass(frozen=True)
class Names:
    """Names of the paths of one merge.

    Attributes:
        known: path, as it is written somewhere -> its name.
        folder: the folder of the configuration file, whose files need no more than their names.
    """

    known: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None

    def of(self, model: ModelReference) -> str:
        """The name of a model, with that of its adapter."""
        parts = [model.model, *([] if model.lora is None else [model.lora])]
        return "+".join(self.text(str(part)) for part in parts)

    def text(self, text: str) -> str:
        """A text with names in the place of paths."""
        if text in self.known:
            return self.known[text]
        text = self._paths.sub(lambda found: self.known[found[0]], text)
        return text if self._beside is None else self._beside.sub("", text)

    def tree(self, value: Any) -> Any:
        """Plain values with names in the place of paths, in keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.tree(key): self.tree(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.tree(entry) for entry in value]
        return value

    @cached_property
    def _paths(self) -> re.Pattern[str]:
        absolute = sorted(filter(os.path.isabs, self.known), key=len, reverse=True)
        either = "|".join(map(re.escape, absolute)) or r"(?!)"
        return re.compile(rf"(?<![\w.-])(?:{either})(?![\w-]|\.\w)")

    @cached_property
    def _beside(self) -> re.Pattern[str] | None:
        if self.folder is None or self.folder == str(Path(self.folder).parent):
            return None
        return re.compile(rf"(?<![\w.-]){re.escape(self.folder + os.sep)}")


def names_of(checked: Checked) -> Names:
    """The names of all paths that a configuration has."""
    named = _NAMING.get() or Naming()
    folder = None if named.folder is None else Path(_absolute(str(named.folder)))
    known = dict(named.given)
    for path in dict.fromkeys(_paths_in(checked)):
        forms = _forms(path)
        name = next((named.given[form] for form in forms if form in named.given), None)
        if name is None:
            taken = {own for form, own in known.items() if form not in forms}
            name = _name(path, folder, taken)
        known.update(dict.fromkeys(forms, name))
    return Names(known, None if folder is None else str(folder))


def _forms(path: str) -> tuple[str, ...]:
    """The ways in which a path may be written in messages and files."""
    return (path, _absolute(path), str(Path(path).resolve()))


def _absolute(path: str) -> str:
    """The path from the root, with links and without `..`."""
    return os.path.normpath(Path(path).absolute())


def _paths_in(checked: Checked) -> Iterator[str]:
    """Local paths as the configuration has them: of models, adapters, texts and coefficients."""
    models = [*([checked.base] if checked.base else []), *checked.models]
    for part in (part for model in models for part in (model.model, model.lora)):
        if part is not None and Path(part.path).exists():
            yield part.path
    texts = checked.calibrations.values()
    sources = (own for text in texts for own in ([text] if isinstance(text, str) else text))
    for location, *options in map(OPTION.split, sources):
        template = (o.partition("=")[2] for o in options if o.startswith("chat_template="))
        yield from (own for own in (location, *template) if _is_path(own))
    given = (checked.run.coefficients, checked.run.start)
    yield from (own for own in given if own is not None and _is_path(own))


def _is_path(text: str) -> bool:
    return Path(text).is_absolute() or Path(text).exists()


def _name(path: str, folder: Path | None, taken: Iterable[str]) -> str:
    """The name of a path; one that nothing else has."""
    absolute = _absolute(path)
    if folder is None and not Path(path).is_absolute():
        return PurePath(os.path.normpath(path)).as_posix()
    if folder is not None and _share_a_folder(absolute, folder):
        return Path(os.path.relpath(absolute, folder)).as_posix()
    parts = PurePath(absolute).parts
    ends = ("/".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if end not in taken), parts[-1])


def _share_a_folder(path: str, folder: Path) -> bool:
    """Whether a path and a folder are below one folder that is not the root of the disk."""
    return PurePath(path).parts[:2] == folder.parts[:2] and len(folder.parts) > 1
