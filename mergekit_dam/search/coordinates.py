"""The unknowns of the end-to-end objective: one tensor of them for every tensor that is fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import column_counts
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.errors import ConfigError
from mergekit_dam.model.units import Anatomy
from mergekit_dam.parameters import Nonlinearity
from mergekit_dam.sources.stage import OpenStage

_RANGES: dict[Nonlinearity, tuple[float, float]] = {"tanh": (-1, 1), "sigmoid": (0, 1)}

_ROUNDING = 1e-6
"""A start nearer to the edge of a range is at the edge: what is left is rounding in fp32."""


def apply(name: Nonlinearity, raw: Tensor) -> Tensor:
    """Coefficients of learned values, of one shape and dtype, differentiable."""
    if name == "tanh":
        return raw.tanh()
    if name == "sigmoid":
        return raw.sigmoid()
    return raw.relu() if name == "relu" else raw


def invert(name: Nonlinearity, value: Tensor) -> Tensor:
    """The learned values whose coefficients are the given ones, in their shape and dtype.

    A coefficient of 0 under "relu" comes back as 0, where the gradient is 0: it stays there.

    Raises:
        ConfigError: no learned value gives one of the coefficients.
    """
    if name == "relu":
        _require(name, value, value > -_ROUNDING, "of 0 or more")
        return value.clamp_min(0)
    if name in _RANGES:
        low, high = _RANGES[name]
        inside = (value > low + _ROUNDING) & (value < high - _ROUNDING)
        _require(name, value, inside, f"between {low} and {high}")
    if name == "tanh":
        return value.atanh()
    return value.logit() if name == "sigmoid" else value


def _require(name: Nonlinearity, value: Tensor, reached: Tensor, expected: str) -> None:
    """Refuse a start that is not reached."""
    if not reached.all():
        raise ConfigError(
            f"nonlinearity: {name} can only give coefficients {expected}, got one that starts "
            f"at {float(value[~reached][0]):g}; use `nonlinearity: none`, or another start"
        )


@dataclass(frozen=True)
class Coordinate:
    """The unknowns of one output tensor.

    Attributes:
        name: of the output tensor.
        kind: "linear", "norm", "embedding", "head", "router", "experts" or "bias".
        form: from unknowns to coefficients.
        columns: how many unknowns a direction: those of the input axis, of every expert, or 1.
        axis: the input dimension of the tensor.
    """

    name: str
    kind: str
    form: Parametrisation
    columns: int
    axis: int


def coordinates_of(opened: OpenStage, anatomy: Anatomy, head: str | None) -> list[Coordinate]:
    """The tensors of a stage whose coefficients are fitted.

    Linears, those of every expert, norms and embeddings by column, biases by one scalar a model.
    Not among them: what the configuration leaves averaged, tensors that all sources agree on, and
    whatever is none of these (convolutions).

    Args:
        head: name of the output head's unit.
    """
    found = []
    for unit in anatomy.units:
        if unit.kind == "other":
            continue
        kind = "head" if unit.name == head else unit.kind
        axes = {linear.parameter: linear.axis for linear in unit.linears} or {"weight": unit.axis}
        for parameter in unit.parameters:
            sources = opened.sources[unit.parameter(parameter)]
            settings = sources.settings
            if not settings.fits(kind) or sources.identical:
                continue
            weighs = parameter in axes
            axis = axes.get(parameter, -1)
            by_column = weighs and settings.granularity == "column"
            counts = column_counts(sources.tensors[0].shape, axis)
            found.append(
                Coordinate(
                    name=sources.name,
                    kind=kind if weighs else "bias",
                    form=settings.parametrisation,
                    columns=counts[-1] if by_column else 1,
                    axis=axis,
                )
            )
    return found


def starting_unknowns(
    coordinates: Sequence[Coordinate],
    start: MergeRecord,
    nonlinearity: Nonlinearity,
    device: torch.device,
) -> dict[str, Tensor]:
    """Unknowns fp64 `[U, columns]` by name, which ask for gradients.

    Args:
        start: coefficients `[S, columns]` or `[S, 1]` of every tensor.

    Raises:
        DamError: the non-linearity cannot reach the start.
    """
    unknowns = {}
    for coordinate in coordinates:
        coefficients = start.coefficients[coordinate.name].to(device)
        value = coordinate.form.unknowns(coefficients)
        if coordinate.columns == 1:  # the start may be of a fit column by column
            value = value.mean(1, keepdim=True)
        value = value.expand(-1, coordinate.columns)
        unknowns[coordinate.name] = invert(nonlinearity, value).contiguous().requires_grad_(True)
    return unknowns


def coefficients_of(
    coordinates: Sequence[Coordinate], unknowns: Mapping[str, Tensor], nonlinearity: Nonlinearity
) -> dict[str, Tensor]:
    """Coefficients fp32 `[S, columns]` by name, differentiable in the unknowns."""
    return {c.name: c.form.coefficients(apply(nonlinearity, unknowns[c.name])) for c in coordinates}
