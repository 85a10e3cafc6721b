"""The fit of one linear from its moments: first the columns of the weight, then the bias."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_dam.coefficients.correction import out_by_in
from mergekit_dam.coefficients.tensors import FittedTensor, TensorSources
from mergekit_dam.fitting.correction import correct
from mergekit_dam.fitting.evidence import Evidence, Losses, M
from mergekit_dam.fitting.judged import judged, judged_solution
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.moments import (
    LinearMoments,
    measured_plainly,
    plain_weights,
    pooled,
)
from mergekit_dam.fitting.problem import ColumnProblem
from mergekit_dam.fitting.solver import solve_columns, solve_small, solve_tensor

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Residual:
    """Targets minus the output of the weight, summed over the weighted tokens, fp64 `[n]`."""

    total: Tensor
    count: Tensor
    metric: Metric = PLAIN
    scale: float = 1.0


def fit_bias(
    bias: TensorSources, residuals: Sequence[Residual], weight: Tensor, evidence: Evidence[M]
) -> FittedTensor:
    """Fit the bias of a linear or of a norm.

    Args:
        residuals: One residual for each entry of the evidence's `fit`.
        weight: Merged weight, in the form that the evidence judges.
    """
    started = time.perf_counter()
    form = bias.settings.parametrisation
    directions, average = form.directions(bias.tensors), form.average(bias.tensors)
    matrix = directions.new_zeros(len(directions), len(directions))
    rhs = directions.new_zeros(len(directions))
    for left in residuals:
        weighted = left.scale * left.metric(directions.T)
        matrix += left.count * directions @ weighted
        rhs += weighted.T @ (left.total - left.count * average)
    solution = solve_small(matrix[None], rhs[None], bias.settings.ridge)
    return judged_solution(
        bias,
        "bias",
        solution,
        lambda merged: evidence.losses(weight, merged),
        started=started,
    )


def fit_linear(
    weight: TensorSources,
    bias: TensorSources | None,
    evidence: Evidence[LinearMoments],
    *,
    axis: int,
) -> list[FittedTensor]:
    """Fit the weight of a linear and, after it, its bias.

    Args:
        axis: Input axis of the weight: -1 for `[out, in]`, 0 for `[in, out]`.

    Returns:
        The fitted weight and, where there is one, the fitted bias.
    """
    bias_start = None if bias is None else bias.merged(bias.start())
    fitted = _fit_columns(weight, bias_start, evidence, axis=axis)
    if weight.settings.correction != "none":
        fitted = correct(fitted, evidence, bias_start)
    if bias is None or bias_start is None:
        return [fitted]
    facing_merged = out_by_in(fitted.merged, axis)
    residuals = [
        Residual(m.y_sum - facing_merged.double() @ m.inputs.x_sum, m.count, m.metric, m.scale)
        for m in evidence.fit
    ]
    return [fitted, fit_bias(bias, residuals, facing_merged, evidence)]


def _fit_columns(
    weight: TensorSources,
    bias: Tensor | None,
    evidence: Evidence[LinearMoments],
    *,
    axis: int,
) -> FittedTensor:
    """Fit the coefficients of the weight; `bias` is the merged bias that the linear adds."""
    started = time.perf_counter()
    form = weight.settings.parametrisation
    facing = [out_by_in(tensor, axis) for tensor in weight.tensors]
    problem, fit_loss = _problem(weight, facing, bias, evidence)
    if weight.settings.granularity == "tensor":
        solution = solve_tensor(problem, weight.settings.ridge)
    else:
        rough = weight.settings.correction != "none"
        solution = solve_columns(problem, weight.settings.ridge, rough=rough)
    del problem
    if not solution.converged:
        LOG.warning("%s: %s", weight.name, solution.limit_reached)

    def held_out(coefficients: Tensor) -> float:
        merged = weight.merged(coefficients, axis=axis)
        return evidence.held_out_loss(out_by_in(merged, axis), bias)

    candidate = form.stepped(solution.step)
    # The objective without its ridge is the loss up to a constant: the loss falls by the gain.
    return judged(
        weight,
        "linear",
        candidate,
        axis=axis,
        before=Losses(fit_loss, held_out(weight.start())),
        after=Losses(
            None if fit_loss is None else fit_loss - solution.gain / evidence.total,
            held_out(candidate),
        ),
        solver=solution.statistics(),
        started=started,
    )


def _problem(
    weight: TensorSources,
    facing: Sequence[Tensor],
    bias: Tensor | None,
    evidence: Evidence[LinearMoments],
) -> tuple[ColumnProblem, float | None]:
    """The problem of the step away from the average, and the loss of that on the data of the fit.

    Where a correction follows, columns are fitted in the plain metric: it recovers as much, and
    products with metrics cost much. Then, or where its sums are not kept, the loss is None.
    """
    form, dtype = weight.settings.parametrisation, evidence.fit[0].cross.dtype
    if weight.settings.correction != "none" and not measured_plainly(evidence.fit):
        whole = pooled(evidence.fit, plain_weights(evidence.fit))
        term = whole.term(form.average(facing, dtype), bias)
        del whole  # its cross moments are in the residual
        return ColumnProblem(form.directions(facing, dtype), [term]), None
    average, directions = form.average(facing, dtype), form.directions(facing, dtype)
    terms = [moments.term(average, bias) for moments in evidence.fit]
    if not evidence.knows_fit_loss:
        return ColumnProblem(directions, terms), None
    pairs = zip(evidence.fit, terms, strict=True)
    loss = sum(m.error(average, bias, term.residual) for m, term in pairs) / evidence.total
    return ColumnProblem(directions, terms), loss
