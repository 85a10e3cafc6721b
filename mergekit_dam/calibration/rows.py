"""What every reader yields: a row, and where it stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: its columns, or a bare string where the format has none.

    `origin` is for messages ("data/math.jsonl line 3"), `file` for the provenance: a
    local path, or None for a Hub dataset.
    """

    value: Mapping[str, Any] | str
    origin: str
    file: str | None = None
