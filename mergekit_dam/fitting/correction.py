"""The correction of one linear: the matrix that leaves the least error once its columns are fitted.

Ridges go down as long as held-out data prefers the next. In metrics, they are judged by their
minimisers in the pooled plain metric, and the best is refined. Related methods are FeatCal
(arXiv 2605.13030) and RegMean++ (arXiv 2508.03121), which correct from other starts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction, out_by_in, saves_room
from mergekit_dam.coefficients.tensors import FittedTensor, TensorSettings
from mergekit_dam.fitting.correction_problem import CorrectionProblem, Minimiser
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.low_rank import best_factors
from mergekit_dam.fitting.moments import LinearMoments, measured_plainly
from mergekit_dam.streams.distributed import from_first
from mergekit_dam.streams.memory import memory_of
from mergekit_dam.streams.storage import may_stay

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Ridges relative to the mean diagonal, tried in this order until the held-out loss rises."""


def correct(
    fitted: FittedTensor, evidence: Evidence[LinearMoments], bias: Tensor | None
) -> FittedTensor:
    """Add a correction to a fitted weight, if that lowers the held-out loss.

    Args:
        fitted: The weight after the fit of its columns, whether that was kept or not.
        evidence: Moments and tokens that the columns were fitted to and judged by.
        bias: Merged bias `[out]` that the linear adds, or None.
    """
    axis = fitted.axis
    start_weight = out_by_in(fitted.merged, axis)

    def merged(correction: Correction) -> Tensor:
        return fitted.sources.merged(fitted.coefficients, axis=axis, correction=correction)

    def held_out(candidate: Correction) -> float:
        return evidence.held_out_loss(out_by_in(merged(candidate), axis), bias)

    report = fitted.report
    start = report.held_out_fitted if report.outcome == "fitted" else report.held_out_start
    assert start is not None
    said: dict[str, Any] = {"outcome": "dropped: held-out loss was not better"}
    problem = CorrectionProblem(evidence.fit, start_weight, bias, _dtype(evidence))
    ridge, found = _ridge(problem, lambda step: held_out(Correction(full=step.float())), start)
    best: Correction | None = None
    if ridge is not None:
        found = found or problem.minimiser(ridge)
        assert found is not None
        candidate = _candidate(problem, found, ridge, fitted.sources.settings)
        if (loss := held_out(candidate)) < start:
            best = candidate
            said = {"outcome": "full"}
            if best.left is not None:
                said = {"outcome": "low rank", "rank": best.left.shape[1]}
            said |= {"ridge": ridge, "held_out": loss}
    # Machines may differ in the last bits of a solution; the merged model must not.
    best = from_first(lambda: None if best is None else best.cpu())
    said["held_out_start"] = start
    fitted = replace(fitted, report=replace(fitted.report, correction=said))
    return fitted if best is None else replace(fitted, merged=merged(best), correction=best)


def _dtype(evidence: Evidence[LinearMoments]) -> torch.dtype:
    """The dtype of the solutions: that of the sums in the plain metric, fp32 in others."""
    return evidence.fit[0].cross.dtype if measured_plainly(evidence.fit) else torch.float32


def _ridge(
    problem: CorrectionProblem, held_out: Callable[[Tensor], float], start: float
) -> tuple[float | None, Minimiser | None]:
    """The ridge that held-out data likes best, or None, and the minimiser there.

    Args:
        held_out: Held-out loss with a correction `[out, in]`.
        start: Held-out loss without one.

    Returns:
        No minimiser where the device has no room for another beside it: its factor is as large as
        the Gram matrix.
    """
    best: float | None = None
    kept, lowest = None, start
    # Every process must ask for the same minimisers.
    whole = from_first(lambda: memory_of(problem.weight.device))
    roomy = may_stay(problem.factor_bytes, whole)
    for ridge in RIDGES:
        found = problem.minimiser(ridge)
        if found is None or not (loss := held_out(found.matrix)) < lowest:
            break
        best, lowest = ridge, loss
        kept = found if roomy else None
        del found
    return best, kept


def _candidate(
    problem: CorrectionProblem, found: Minimiser, ridge: float, settings: TensorSettings
) -> Correction:
    """A correction of the kind that is asked for.

    Where factors would take as much room as the matrix, it is the matrix.
    """
    rank = settings.correction_rank
    if settings.correction == "low_rank" and saves_room(found.whitened.shape, rank):
        left, right = best_factors(problem, found, ridge, rank)
        return Correction(left=left.float().contiguous(), right=right.float().contiguous())
    return Correction(full=problem.refined(found, ridge).float())
