"""The rows of a table that a user asks for, by name."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from mergekit_dam.errors import DamError


def chosen(
    names: Sequence[str], *, only: Sequence[str], skip: Sequence[str], always: Collection[str]
) -> frozenset[str]:
    """The names of the rows that run.

    Args:
        names: names of all rows.
        only, skip: names, with `*` for any letters; without `only`, every row is asked for.
        always: rows that the others are compared with, and that therefore always run.

    Raises:
        DamError: if something in `only` or `skip` names no row.
    """
    for pattern in (*only, *skip):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DamError(f"no row is named {pattern!r}; there are {', '.join(names)}")

    def wanted(name: str) -> bool:
        asked_for = not only or any(fnmatchcase(name, pattern) for pattern in only)
        return asked_for and not any(fnmatchcase(name, pattern) for pattern in skip)

    return frozenset(name for name in names if name in always or wanted(name))


def refuse_repeated(names: Sequence[str], *, taken: Collection[str] = ()) -> None:
    """Raise DamError if a name stands twice in `names`, or is one of `taken`."""
    twice = sorted({name for name in names if names.count(name) > 1 or name in taken})
    if twice:
        raise DamError(f"a row named {', '.join(twice)} is there already: name it otherwise")
