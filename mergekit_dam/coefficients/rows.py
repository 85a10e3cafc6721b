"""Which row of saved coefficients belongs to which model.

A model is known by the sha256 of the files that hold its weights; then by its name, as a folder or
a repository keeps it; then, if its name is new and this is allowed, by its place in the list.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath


@dataclass(frozen=True)
class Identity:
    """A model, and how it is told from others.

    Attributes:
        name: Its name in messages and files.
        files: File -> sha256 of every file that holds its weights; empty if that is not known.
        also: Other names by which a file may know it.
    """

    name: str
    files: Mapping[str, str] = field(default_factory=dict)
    also: Collection[str] = ()

    def goes_by(self, name: str) -> bool:
        """Whether a name of a file means this model: its own, or the end of its path."""
        names = {self.name, *self.also}
        return name in names or any(_ends(own, name) or _ends(name, own) for own in names)


@dataclass(frozen=True)
class Matched:
    """The rows of some models.

    Attributes:
        rows: Index of each model's row.
        changed: Sentences about models that have another model's weights or name.
        named: How many of the models the file knows by weights or name.
    """

    rows: tuple[int, ...]
    changed: tuple[str, ...]
    named: int


def match_rows(saved: Sequence[Identity], models: Sequence[Identity]) -> Matched:
    """Find the row of every model, in three rounds: by weights, by name, by place.

    Args:
        saved: The models of the rows.
        models: As many models.
    """
    rows: dict[int, int] = {}
    changed = []

    def take(fits: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
        taken = []
        for index, candidates in fits.items():
            free = [row for row in candidates if row not in rows.values()]
            if index not in rows and free:
                rows[index] = free[0]
                taken.append((index, free[0]))
        return taken

    every = range(len(saved))
    equal = {i: [r for r in every if _equal(saved[r], m)] for i, m in enumerate(models)}
    named = {i: [r for r in every if m.goes_by(saved[r].name)] for i, m in enumerate(models)}
    exact = {i: [r for r in every if saved[r].name == m.name] for i, m in enumerate(models)}
    take({i: [r for r in equal[i] if r in named[i]] for i in equal})
    take(equal)
    for index, row in (*take(exact), *take(named)):
        changed += _differences(saved[row], models[index])
    known = len(rows)
    left = [row for row in every if row not in rows.values()]
    for index, row in zip([i for i in every if i not in rows], left, strict=True):
        rows[index] = row
        changed.append(
            f"{models[index].name} has neither the weights nor the name of a model of that merge; "
            f"by its place it would take the coefficients of {saved[row].name}"
        )
    return Matched(tuple(rows[index] for index in every), tuple(changed), known)


def _equal(saved: Identity, model: Identity) -> bool:
    return bool(saved.files) and saved.files == model.files


def _differences(saved: Identity, model: Identity) -> list[str]:
    """What differs between the files of one name; nothing where one side is not known."""
    if not saved.files or not model.files:
        return []
    return [
        f"{model.name}: {file} {_told(saved.files.get(file), model.files.get(file))}"
        for file in sorted({*saved.files, *model.files})
        if saved.files.get(file) != model.files.get(file)
    ]


def _told(was: str | None, is_now: str | None) -> str:
    if was is None:
        return "was no file of the merged model"
    if is_now is None:
        return "is missing"
    return f"has other weights (sha256 {is_now[:12]}) than in that merge ({was[:12]})"


def _ends(path: str, end: str) -> bool:
    """Whether a path ends with the parts of another one."""
    own = [part for part in PurePath(end).parts if part != ".."]
    return bool(own) and list(PurePath(path).parts[-len(own) :]) == own
