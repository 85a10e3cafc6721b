"""The rows that every reader yields, and helpers of the readers."""

import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_dam.errors import CalibrationError

LONGEST = 2**27
"""Characters of a line, a value or a field. More is no text: a file that unpacks without end, or a
quote that is not closed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        value: The columns by name, or a bare string if the format has none.
        origin: Its place for messages, such as "data/math.jsonl line 3".
        file: Local path for the provenance; None for a Hub dataset.
    """

    value: Mapping[str, Any] | str
    origin: str
    file: str | None = None


def refuse_long(length: int, place: str) -> None:
    """Refuse a row before all of it is in memory.

    Raises:
        CalibrationError: It has more than `LONGEST` characters.
    """
    if length > LONGEST:
        raise CalibrationError(
            f"{place} has more than {LONGEST:,} characters: required rows of the length of a "
            f"document; split it, or leave it out"
        )


def require(module: str, *, needed_for: str) -> Any:
    """Import and return `module`.

    Raises:
        CalibrationError: If it is missing; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CalibrationError(
            f"{needed_for} needs the package {module.partition('.')[0]!r}, which cannot be "
            f"imported ({error}): pip install 'mergekit-dam[data]'"
        ) from error


def without_nulls(value: Any) -> Any:
    """A value of a table without the nulls inside of it.

    A table gives every object of a column the keys of all of them, and fills those that a row
    lacks with null. A chat template would take them for present.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(own) for key, own in value.items() if own is not None}
    if isinstance(value, list):
        return [without_nulls(own) for own in value]
    return value


def permutation(count: int, *, seed: int) -> list[int]:
    """The numbers 0 .. count-1 in an order that depends on `seed` alone.

    They are sorted by `random()`, not shuffled: only for `random()` does Python promise the same
    sequence per seed in later versions.
    """
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)
