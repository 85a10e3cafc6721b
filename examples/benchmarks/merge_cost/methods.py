"""The rows of the table: `linear`, `dam` replayed, and fits of `dam`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.benchmarks.measuring.merges import Point
from examples.benchmarks.measuring.selection import chosen, refuse_repeated
from examples.benchmarks.merge_cost.results import LINEAR

REPLAY = "replay"

ANY_FIT = Point(method="dam", parameters={"objective": "layer", "metric": "identity", "samples": 2})
"""A short fit: as many coefficients as any other, to be replayed."""


@dataclass(frozen=True)
class Merge:
    """A row of the table to be."""

    name: str
    point: Point

    @property
    def shown(self) -> dict[str, Any]:
        """The parameters as the table shows them; a file is shown by its name alone."""
        return {
            key: Path(value).name if key == "coefficients" else value
            for key, value in self.point.shown.items()
        }


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The rows that a user asks for.

    Attributes:
        variants: further rows of `dam`, by name, with the parameters that they set.
        only, skip: names of rows, with `*` for any letters.
    """

    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


def select(choices: Choices, *, coefficients: Path) -> tuple[Merge, ...]:
    """The merges to run, `linear` first.

    Args:
        coefficients: the file to replay.

    Raises:
        DamError: if a name is taken twice, or selects nothing.
    """
    parameters: dict[str, Mapping[str, Any]] = {
        REPLAY: {"coefficients": str(coefficients)},
        "layer_identity": {"objective": "layer", "metric": "identity"},
        "layer_sensitivity": {"objective": "layer", "metric": "sensitivity"},
        "dam": {},
    }
    merges = (
        Merge(LINEAR, Point(method="linear", parameters={"weight": 1.0}, base="none")),
        *(
            Merge(name, Point(method="dam", parameters=own))
            for name, own in [*parameters.items(), *choices.variants.items()]
        ),
    )
    names = [merge.name for merge in merges]
    refuse_repeated(names)
    wanted = chosen(names, only=choices.only, skip=choices.skip, always=(LINEAR,))
    return tuple(merge for merge in merges if merge.name in wanted)
