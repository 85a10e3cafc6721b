"""The unknowns of the end-to-end objective: one tensor of unknowns per fitted tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.choices import Nonlinearity
from mergekit_dam.coefficients.correction import out_by_in
from mergekit_dam.coefficients.merge import column_counts
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.errors import ConfigError
from mergekit_dam.model.units import Anatomy
from mergekit_dam.sources.stage import OpenStage

_RANGES: dict[Nonlinearity, tuple[float, float]] = {"tanh": (-1, 1), "sigmoid": (0, 1)}

CORRECTED = ("linear", "router", "experts", "head")
"""Kinds of units whose weights have corrections."""

_ROUNDING = 1e-6
"""A start nearer than this to the edge of a range counts as at the edge: fp32 rounding."""


def apply(name: Nonlinearity, raw: Tensor) -> Tensor:
    """Coefficients from learned values, in their shape and dtype; differentiable."""
    if name == "tanh":
        return raw.tanh()
    if name == "sigmoid":
        return raw.sigmoid()
    return raw.relu() if name == "relu" else raw


def invert(name: Nonlinearity, value: Tensor) -> Tensor:
    """The learned values that give these coefficients, in their shape and dtype.

    Under "relu", a coefficient of 0 gives the learned value 0. The gradient is 0 there, so the
    descent does not move it.

    Raises:
        ConfigError: the nonlinearity cannot give one of the coefficients.
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
    """Refuse a start that the nonlinearity cannot give."""
    if not reached.all():
        raise ConfigError(
            f"nonlinearity: {name} can only give coefficients {expected}, got one that starts "
            f"at {float(value[~reached][0]):g}; use `nonlinearity: none`, or another start"
        )


@dataclass(frozen=True)
class Coordinate:
    """The unknowns of one output tensor.

    Attributes:
        name: name of the output tensor.
        kind: "linear", "norm", "embedding", "head", "router", "experts" or "bias".
        form: the map from unknowns to coefficients.
        columns: number of unknowns per direction: one per input column (of every expert), or 1.
        axis: input dimension of the tensor.
        shape: shape of a weight, seen as `[out, in]`, of every expert if it is fused.
        rank: rank of the factors that are fitted beside the coefficients; 0 without a correction.
    """

    name: str
    kind: str
    form: Parametrisation
    columns: int
    axis: int
    shape: tuple[int, ...] = ()
    rank: int = 0


def coordinates_of(opened: OpenStage, anatomy: Anatomy, head: str | None) -> list[Coordinate]:
    """The tensors of a stage whose coefficients are fitted.

    Linears (also of every expert), norms and embeddings have coefficients per column; biases have
    one scalar per model. Tensors are left out if the configuration averages them, if all sources
    agree on them, or if they are of another kind (convolutions).

    Args:
        opened: the stage.
        anatomy: the units of its part.
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
            like = sources.tensors[0]
            corrected = weighs and kind in CORRECTED and settings.correction != "none"
            shape = tuple(out_by_in(like, axis).shape) if corrected else ()
            found.append(
                Coordinate(
                    name=sources.name,
                    kind=kind if weighs else "bias",
                    form=settings.parametrisation,
                    columns=column_counts(like.shape, axis)[-1] if by_column else 1,
                    axis=axis,
                    shape=shape,
                    rank=min(settings.correction_rank, *shape[-2:]) if corrected else 0,
                )
            )
    return found


def starting_unknowns(
    coordinates: Sequence[Coordinate],
    start: MergeRecord,
    nonlinearity: Nonlinearity,
    device: torch.device,
) -> dict[str, Tensor]:
    """Unknowns fp64 `[U, columns]` by name, which require gradients.

    Args:
        coordinates: the fitted tensors.
        start: coefficients `[S, columns]` or `[S, 1]` of every tensor.
        nonlinearity: function between the unknowns and the coefficients.
        device: device of the unknowns.

    Raises:
        DamError: the nonlinearity cannot give the coefficients of the start.
    """
    unknowns = {}
    for coordinate in coordinates:
        coefficients = start.coefficients[coordinate.name].to(device)
        value = coordinate.form.unknowns(coefficients)
        if coordinate.columns == 1:  # the start may have one coefficient per column
            value = value.mean(1, keepdim=True)
        value = value.expand(-1, coordinate.columns)
        unknowns[coordinate.name] = invert(nonlinearity, value).contiguous().requires_grad_(True)
    return unknowns


def coefficients_of(
    coordinates: Sequence[Coordinate], unknowns: Mapping[str, Tensor], nonlinearity: Nonlinearity
) -> dict[str, Tensor]:
    """Coefficients fp32 `[S, columns]` by name, differentiable in the unknowns."""
    return {c.name: c.form.coefficients(apply(nonlinearity, unknowns[c.name])) for c in coordinates}
