"""The fit of one linear from its moments: columns of the weight first, then the bias."""

import time

import torch
from torch import Tensor

from mergekit_dam.fitting.bias import Residual, fit_bias
from mergekit_dam.fitting.moments import Evidence, LinearMoments
from mergekit_dam.fitting.solver import (
    ColumnProblem,
    Term,
    solve_columns,
    solve_tensor,
)
from mergekit_dam.fitting.tensors import FittedTensor, TensorSources, judged_solution


def fit_linear(
    weight: TensorSources,
    bias: TensorSources | None,
    evidence: Evidence[LinearMoments],
    *,
    axis: int,
) -> list[FittedTensor]:
    """Fit the weight of a linear and, after it, its bias.

    Args:
        axis: input axis of the weight: -1 for `[out, in]`, 0 for `[in, out]`.

    Returns:
        The fitted weight and, where there is one, the fitted bias.
    """
    started = time.perf_counter()
    form = weight.settings.parametrisation
    facing = [_facing(tensor, axis) for tensor in weight.tensors]
    bias_start = None if bias is None else bias.merged(bias.start())

    origin = form.origin(facing)
    terms = [Term(m.gram, _cross(m, origin, bias_start), m.metric) for m in evidence.fit]
    problem = ColumnProblem(form.directions(facing), terms)
    if weight.settings.granularity == "tensor":
        solution = solve_tensor(problem, form.start, weight.settings.ridge)
    else:
        solution = solve_columns(problem, form.start, weight.settings.ridge)
    del problem, terms

    fitted = judged_solution(
        weight,
        "linear",
        solution,
        lambda merged: evidence.losses(_facing(merged, axis), bias_start),
        axis=axis,
        started=started,
    )
    if bias is None or bias_start is None:
        return [fitted]
    facing_merged = _facing(fitted.merged, axis)
    residuals = [
        Residual(m.y_sum - facing_merged.double() @ m.x_sum, m.count, m.metric)
        for m in evidence.fit
    ]
    return [fitted, fit_bias(bias, residuals, facing_merged, evidence)]


def _cross(moments: LinearMoments, origin: Tensor, bias: Tensor | None) -> Tensor:
    """Cross moment of the targets less the output of the origin."""
    cross = moments.cross - origin @ moments.gram
    return cross if bias is None else cross - torch.outer(bias.double(), moments.x_sum)


def _facing(weight: Tensor, axis: int) -> Tensor:
    """A weight as `[out, in]`."""
    return weight.T if axis == 0 else weight
