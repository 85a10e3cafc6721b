"""The unknowns of the end-to-end objective: one tensor of them for every tensor that is fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.anatomy import Anatomy
from mergekit_dam.coefficients import Parametrisation, column_counts
from mergekit_dam.network import OpenStage
from mergekit_dam.objective.nonlinearity import apply, invert
from mergekit_dam.objective.settings import Nonlinearity
from mergekit_dam.stage import Record


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
    start: Record,
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
