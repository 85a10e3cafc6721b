"""The structure of a part of a model, as plain data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from mergekit_dam.model.experts import FusedLinear

Run = Callable[[], Any]


@dataclass(frozen=True)
class Write:
    """How a unit's output reaches the residual stream.

    Attributes:
        scale: Factor with which the output is added.
        through: Name of the norm between the unit and the residual stream, or None.
    """

    scale: float
    through: str | None = None


@dataclass(frozen=True)
class Unit:
    """A module that owns parameters.

    Attributes:
        name: Path of the module, relative to the part.
        kind: Kind of the module. "experts" own fused parameters `[experts, ., .]`; each token uses
            the slices of the experts that it is sent to. A "router" is a linear that returns the
            experts of each token, not its logits. "other" units are averaged, never fitted.
        parameters: Names of the module's own parameters.
        axis: Input axis of a linear's weight: -1 for `[out, in]`, 0 if it is transposed.
        unit_gain: Gain g of a norm `y = (w + g) * n(x) + bias`: 1 in the Gemma family, else 0.
        write: How the output reaches the residual stream, if it does.
        linears: Linears of each expert, in the order in which data passes them.
    """

    name: str
    kind: Literal["linear", "norm", "embedding", "router", "experts", "other"]
    parameters: tuple[str, ...]
    axis: int = -1
    unit_gain: float = 0.0
    write: Write | None = None
    linears: tuple[FusedLinear, ...] = ()

    def parameter(self, name: str) -> str:
        """Path of one of the unit's parameters, relative to the part."""
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True)
class Anatomy:
    """The units of a part, in the order in which data passes them.

    Attributes:
        groups: Groups of units; linears that see the same input form one group.
        residual_scale: Factor with which the part's input reaches its output directly.
    """

    groups: tuple[tuple[Unit, ...], ...]
    residual_scale: float

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, in call order."""
        return tuple(unit for group in self.groups for unit in group)

    def writers_before(self, group: int) -> tuple[Unit, ...]:
        """Units of earlier groups that add to the residual stream directly, not through a norm."""
        return tuple(
            unit
            for units in self.groups[:group]
            for unit in units
            if unit.write and unit.write.through is None
        )


class OfKind(Protocol):
    """A unit, as far as grouping asks."""

    @property
    def kind(self) -> str:
        """Such as "linear"."""


U = TypeVar("U", bound=OfKind)
X = TypeVar("X")


def grouped(
    units: Iterable[tuple[U, X]], same: Callable[[X, X], bool]
) -> tuple[tuple[U, ...], ...]:
    """Groups of units that are fitted together: linears that see one input; all others alone.

    Args:
        units: in call order, each with what enters it.
        same: tells whether two inputs are the same.
    """
    groups: list[list[tuple[U, X]]] = []
    for unit, x in units:
        for group in groups:
            first, entered = group[0]
            if unit.kind == first.kind == "linear" and same(x, entered):
                group.append((unit, x))
                break
        else:
            groups.append([(unit, x)])
    return tuple(tuple(unit for unit, _ in group) for group in groups)


@dataclass
class UnitCall:
    """One unit in the recorded forward pass: its number of calls, and the first call."""

    calls: int
    input: Tensor | None
    output: Any
    call: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
