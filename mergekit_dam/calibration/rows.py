"""What every reader yields: a row, and where it stands."""

import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_dam.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: its columns, or a bare string where the format has none.

    `origin` is for messages ("data/math.jsonl line 3"), `file` for the provenance: a
    local path, or None for a Hub dataset.
    """

    value: Mapping[str, Any] | str
    origin: str
    file: str | None = None


def require(module: str, *, needed_for: str) -> Any:
    """Import and return `module`.

    Raises CalibrationError, with the command that installs it, where it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CalibrationError(
            f"{needed_for} needs the package {module.partition('.')[0]!r}, which cannot be "
            f"imported ({error}): pip install 'mergekit-dam[data]'"
        ) from error


STANDARD_COLUMNS = ("text", "messages", "input_ids")


def permutation(count: int, *, seed: int) -> list[int]:
    """The numbers 0 .. count-1 in an order that follows from `seed` alone.

    Sorting by `random()` rather than `shuffle`: of the two, Python only promises that the
    former gives the same sequence for a seed in later versions.
    """
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)
