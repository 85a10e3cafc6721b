"""The fit of one linear from its moments: columns of the weight first, then the bias."""

import time
from collections.abc import Sequence

from torch import Tensor

from mergekit_dam.fitting.bias import Residual, fit_bias
from mergekit_dam.fitting.moments import Evidence, LinearMoments, Losses
from mergekit_dam.fitting.solver import (
    ColumnProblem,
    Solution,
    Term,
    solve_columns,
    solve_tensor,
)
from mergekit_dam.fitting.tensors import FittedTensor, TensorSources, judged


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

    average = form.average(facing, evidence.fit[0].cross.dtype)
    fit_loss = evidence.fit_loss(average, bias_start)
    solution = _solve(weight, facing, average, bias_start, evidence)
    del average

    def held_out(coefficients: Tensor) -> float:
        merged = weight.merged(coefficients, axis=axis)
        return evidence.held_out_loss(_facing(merged, axis), bias_start)

    candidate = form.stepped(solution.step)
    fitted = judged(
        weight,
        "linear",
        candidate,
        axis=axis,
        before=Losses(fit_loss, held_out(weight.start())),
        after=Losses(fit_loss - solution.gain / evidence.total, held_out(candidate)),
        solver=solution.statistics(),
        started=started,
    )
    if bias is None or bias_start is None:
        return [fitted]
    facing_merged = _facing(fitted.merged, axis)
    residuals = [
        Residual(m.y_sum - facing_merged.double() @ m.inputs.x_sum, m.count, m.metric, m.scale)
        for m in evidence.fit
    ]
    return [fitted, fit_bias(bias, residuals, facing_merged, evidence)]


def _solve(
    weight: TensorSources,
    facing: Sequence[Tensor],
    average: Tensor,
    bias: Tensor | None,
    evidence: Evidence[LinearMoments],
) -> Solution:
    """The step away from the average, in its dtype."""
    terms = [
        Term(m.inputs.gram, m.residual(average, bias), m.metric, m.scale) for m in evidence.fit
    ]
    directions = weight.settings.parametrisation.directions(facing, average.dtype)
    problem = ColumnProblem(directions, terms)
    if weight.settings.granularity == "tensor":
        return solve_tensor(problem, weight.settings.ridge)
    return solve_columns(problem, weight.settings.ridge)


def _facing(weight: Tensor, axis: int) -> Tensor:
    """A weight as `[out, in]`."""
    return weight.T if axis == 0 else weight
