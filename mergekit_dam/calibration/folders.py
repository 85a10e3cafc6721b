"""Folders of text -> files: links are followed, and one split of a dataset is taken."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.calibration.suffixes import SUFFIXES, suffix_of
from mergekit_dam.errors import CalibrationError, listed
from mergekit_dam.untrusted import parsed_json

_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that `datasets` writes beside the data of a dataset."""

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in names of files and folders that mean a split, as on the Hub."""

_SHARD = re.compile(r"(?P<split>.+)[-.]\d{5}-of-\d{5}.*")


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a local source.

    Attributes:
        files: Sorted by name.
        left_out: Sentences that say which files were left out, and why.
    """

    files: Sequence[Path]
    left_out: tuple[str, ...] = ()


def find_files(source: CalibrationSource) -> Found:
    """The files of a local source.

    A folder is searched recursively, through links too. Left out are hidden files, files of
    another type than `SUFFIXES`, files that `datasets` writes beside its data, and the files of
    other splits than `source.split`, or than the training split if there is one.

    Raises:
        CalibrationError: If no file is left, or if it is not clear which split is meant.
    """
    root = source.path
    if source.kind == "file":
        return Found([root])
    # Sorted by the posix form, as Windows compares paths without regard to case.
    try:
        inside = sorted(_inside(root), key=lambda path: path.relative_to(root).as_posix())
        files = _data_files(inside, root)
    except OSError as error:
        raise CalibrationError(f"{root.absolute()} cannot be searched: {error}") from error
    if not files:
        raise CalibrationError(
            f"the directory {root.absolute()} holds no {', '.join(SUFFIXES)} file "
            f"({len(inside)} others were ignored): name a directory with calibration text"
        )
    ignored = len(inside) - len(files)
    said = []
    if ignored:
        said.append(f"{ignored:,} hidden files or files of another type were ignored")
    chosen, others = _of_split(files, root, source.split)
    return Found(chosen, (*said, *others))


def _inside(root: Path) -> Iterator[Path]:
    """Every file below a folder; a folder that several links lead to is searched once."""
    seen: set[Path] = set()

    def refuse(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(root, followlinks=True, onerror=refuse):
        here = Path(folder).resolve()
        if here in seen:  # a link to a folder that contains it would have no end
            names.clear()
            continue
        seen.add(here)
        names.sort()
        yield from (path for path in (Path(folder, name) for name in files) if path.is_file())


def _data_files(inside: Iterable[Path], root: Path) -> list[Path]:
    states = {path.parent: path for path in inside if path.name == "state.json"}
    own = {folder: _files_of_state(state) for folder, state in states.items()}

    def is_data(path: Path) -> bool:
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            return False
        if suffix_of(path) == ".arrow" and own.get(path.parent) is not None:
            return path.name in own[path.parent]  # others are caches
        return bool(suffix_of(path)) and path.name not in _METADATA

    return [path for path in inside if is_data(path)]


def _files_of_state(state: Path) -> set[str]:
    """The data files of a dataset that `save_to_disk` wrote; empty for another state.json."""
    try:
        content = parsed_json(state.read_bytes())
        return {entry["filename"] for entry in content["_data_files"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _of_split(
    files: Sequence[Path], root: Path, asked: str | None
) -> tuple[Sequence[Path], tuple[str, ...]]:
    """The files of one split, and what is said of the others."""
    is_saved = (root / "dataset_dict.json").is_file()
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        relative = path.relative_to(root)
        name = relative.parts[0] if is_saved else _split_name(relative)
        splits.setdefault(name, []).append(path)
    chosen = _choose(splits, root, asked)
    wanted = {path for name in chosen for path in splits[name]}
    kept = [path for path in files if path in wanted]
    left = [str(name) for name in splits if name not in chosen]
    if not left:
        return kept, ()
    count = len(files) - len(kept)
    said = f"{count:,} files of other splits ({listed(sorted(left))}) were left out"
    return kept, (said + ("" if asked else ": `:split=NAME` takes another split"),)


def _choose(
    splits: Mapping[str | None, Sequence[Path]], root: Path, asked: str | None
) -> list[str | None]:
    """Names of the splits to read, and None for files of no split."""
    names = [name for name in splits if name is not None]
    known = ", ".join(sorted(names)) or "files of no split"
    if asked is not None:
        exact = [name for name in names if name == asked]
        meant = _meaning(asked) if asked.isidentifier() else None  # not `train[:10%]`
        close = [name for name in names if meant and _meaning(name) == meant]
        if not exact and len(close) != 1:
            raise CalibrationError(
                f"the folder {root.absolute()} has no split {asked!r}; it has {known}: write one "
                "of these, or leave out `split`"
            )
        return list(exact or close)
    plain: list[str | None] = [None] if None in splits else []
    training = [name for name in names if _meaning(name) == "train"]
    if len(training) == 1 or "train" in training:
        return [*plain, "train" if "train" in training else training[0]]
    if plain and not training:
        return plain
    if len(names) > 1:
        raise CalibrationError(
            f"the folder {root.absolute()} has the splits {known}: write `:split=NAME` behind it"
        )
    return [*plain, *names]


def _split_name(relative: Path) -> str | None:
    """The split that the name of a file or of its folders means; None if none does.

    A shard (`train_sft-00000-of-00003.parquet`) and a folder have a name of their own; that of
    another file is the split that its words mean.
    """
    shard = _SHARD.fullmatch(relative.name)
    name = shard["split"] if shard else relative.name
    if _meaning(name):
        return name if shard and re.fullmatch(r"\w+", name) else _meaning(name)
    folders = (part for part in reversed(relative.parts[:-1]) if _meaning(part))
    return next(folders, None)


def _meaning(name: str) -> str | None:
    """The split that a word in a name means: "train" of `train_sft`."""
    words = re.split(r"[^a-z]+", name.lower())
    found = (split for split, known in _KEYWORDS.items() if any(word in known for word in words))
    return next(found, None)
