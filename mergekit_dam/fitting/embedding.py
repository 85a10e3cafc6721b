"""The fit of an embedding: N unknowns per dimension; tokens are weighted by their counts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.coefficients.tensors import FittedTensor, TensorSources
from mergekit_dam.fitting.evidence import Losses, scales
from mergekit_dam.fitting.judged import judged_solution
from mergekit_dam.fitting.solver import solve_small

ROWS = 4096
"""Number of rows of an embedding that are processed at once."""


@dataclass(frozen=True)
class Usage:
    """How often one model's data uses the rows of an embedding.

    Attributes:
        source: Index of the model among the sources.
        fit, held_out: Counts `[rows]` in the data of the fit and in the held-out data.
    """

    source: int
    fit: Tensor
    held_out: Tensor


def fit_embedding(embedding: TensorSources, usage: Sequence[Usage]) -> FittedTensor:
    """Fit the merged rows to model k's rows, for the rows that model k's data uses.

    Minimises over the coefficients, per dimension, `sum_k w_k sum_rows count_k |E - E_k|^2`.
    The factor `w_k` is the loss weight of model k, divided by the energy of its rows (`scales`).
    """
    started = time.perf_counter()
    settings = embedding.settings
    form = settings.parametrisation
    dimensions, unknowns = embedding.tensors[0].shape[1], len(form.start)
    device = embedding.tensors[0].device
    matrix = torch.zeros(dimensions, unknowns, unknowns, dtype=torch.float64, device=device)
    rhs = torch.zeros(dimensions, unknowns, dtype=torch.float64, device=device)
    factors = _scales(embedding, [(use, use.fit) for use in usage])
    for use, factor in zip(usage, factors, strict=True):
        for rows in _used_rows(use.fit):
            tensors = [tensor[rows] for tensor in embedding.tensors]
            directions = form.directions(tensors)
            weighted = directions * (factor * use.fit[rows, None])
            gap = tensors[use.source].double() - form.average(tensors)
            matrix += torch.einsum("uvd,wvd->duw", weighted, directions)
            rhs += torch.einsum("uvd,vd->du", weighted, gap)
    if settings.granularity == "tensor":
        matrix, rhs = matrix.sum(0, keepdim=True), rhs.sum(0, keepdim=True)
    solution = solve_small(matrix, rhs, settings.ridge)
    return judged_solution(
        embedding,
        "embedding",
        solution,
        lambda merged: _losses(embedding, merged, usage),
        started=started,
    )


def _used_rows(counts: Tensor) -> Sequence[Tensor]:
    return torch.split(counts.nonzero().squeeze(1), ROWS)


def _energy(embedding: TensorSources, use: Usage, counts: Tensor) -> float:
    own = embedding.tensors[use.source]
    return sum(
        float((own[rows].double().square() * counts[rows, None]).sum())
        for rows in _used_rows(counts)
    )


def _losses(embedding: TensorSources, merged: Tensor, usage: Sequence[Usage]) -> Losses:
    """Errors of the merged rows, as fractions of the energy of the rows used."""
    return Losses(
        _loss(embedding, merged, [(use, use.fit) for use in usage]),
        _loss(embedding, merged, [(use, use.held_out) for use in usage]),
    )


def _loss(embedding: TensorSources, merged: Tensor, usage: Sequence[tuple[Usage, Tensor]]) -> float:
    total = 0.0
    for (use, counts), scale in zip(usage, _scales(embedding, usage), strict=True):
        own = embedding.tensors[use.source]
        error = sum(
            float(((merged[r].double() - own[r].double()).square() * counts[r, None]).sum())
            for r in _used_rows(counts)
        )
        total += scale * error
    return total / sum(embedding.settings.loss_weights[use.source] for use, _ in usage)


def _scales(embedding: TensorSources, usage: Sequence[tuple[Usage, Tensor]]) -> list[float]:
    weights = [embedding.settings.loss_weights[use.source] for use, _ in usage]
    return scales(weights, [_energy(embedding, use, counts) for use, counts in usage])
