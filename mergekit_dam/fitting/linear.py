"""The fit of one linear from its moments: columns of the weight first, then the bias."""

import time

import torch
from torch import Tensor

from mergekit_dam.fitting.bias import fit_bias
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
    moments = evidence.fit
    form = weight.settings.parametrisation
    facing = [_facing(tensor, axis) for tensor in weight.tensors]
    bias_start = None if bias is None else bias.merged(bias.start())

    cross = moments.cross - form.origin(facing) @ moments.gram
    if bias_start is not None:
        cross -= torch.outer(bias_start.double(), moments.x_sum)
    problem = ColumnProblem(form.directions(facing), (Term(moments.gram, cross),))
    if weight.settings.granularity == "tensor":
        solution = solve_tensor(problem, form.start, weight.settings.ridge)
    else:
        solution = solve_columns(problem, form.start, weight.settings.ridge)
    del problem, cross

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
    residual = moments.y_sum - facing_merged.double() @ moments.x_sum
    return [fitted, fit_bias(bias, residual, facing_merged, evidence)]


def _facing(weight: Tensor, axis: int) -> Tensor:
    """A weight as `[out, in]`."""
    return weight.T if axis == 0 else weight
