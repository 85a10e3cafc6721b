"""The correction of one linear: the matrix that leaves the least error once its columns are fitted.

Ridges go down as long as held-out data prefers the next. Related methods are FeatCal
(arXiv 2605.13030) and RegMean++ (arXiv 2508.03121), which correct from other starts.
"""

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor

from mergekit_dam.coefficients.correction import Correction, out_by_in
from mergekit_dam.coefficients.tensors import FittedTensor, TensorSettings
from mergekit_dam.fitting.correction_problem import CorrectionProblem, Solved
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.moments import LinearMoments
from mergekit_dam.fitting.problem import Term
from mergekit_dam.streams.distributed import from_first

LOG = logging.getLogger(__name__)

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

    start = evidence.held_out_loss(start_weight, bias)
    best, lowest = None, start
    said: dict[str, Any] = {"outcome": "dropped: held-out loss was not better"}
    problem = problem_of(evidence, start_weight, bias)
    solved: Solved | None = None
    for ridge in RIDGES:
        solved = problem.solve(ridge, None if solved is None else solved.step)
        candidate = _candidate(problem, solved, ridge, fitted.sources.settings)
        if solved is None or candidate is None:  # nor are smaller ridges positive definite
            break
        loss = evidence.held_out_loss(out_by_in(merged(candidate), axis), bias)
        if not loss < lowest:
            break
        best, lowest = candidate, loss
        said = {"outcome": fitted.sources.settings.correction.replace("_", " "), "ridge": ridge}
        if not solved.converged:
            said["stopped"] = solved.limit_reached
    # Machines may differ in the last bits of a solution; the merged model must not.
    best = from_first(lambda: None if best is None else best.cpu())
    said["held_out_start"] = start
    if best is not None:
        said |= {"held_out": lowest} | ({} if best.left is None else {"rank": best.rank})
    if "stopped" in said:
        LOG.warning("%s: correction: %s", fitted.sources.name, said["stopped"])
    fitted = replace(fitted, report=replace(fitted.report, correction=said))
    return fitted if best is None else replace(fitted, merged=merged(best), correction=best)


def problem_of(
    evidence: Evidence[LinearMoments], weight: Tensor, bias: Tensor | None
) -> CorrectionProblem:
    """The quadratic of the correction of a merged weight `[out, in]`.

    Conjugate gradients run in fp32: their tolerance needs no more.
    """
    terms = [Term(m.inputs.gram, m.residual(weight, bias), m.metric, m.scale) for m in evidence.fit]
    problem = CorrectionProblem(terms)
    if problem.plain:
        return problem
    single = [replace(t, gram=t.gram.float(), residual=t.residual.float()) for t in terms]
    return CorrectionProblem(single)


def _candidate(
    problem: CorrectionProblem, solved: Solved | None, ridge: float, settings: TensorSettings
) -> Correction | None:
    """A correction of the kind that is asked for; None where it cannot be computed."""
    if solved is None:
        return None
    if settings.correction == "low_rank":
        return problem.truncated(solved.step, ridge, settings.correction_rank)
    return Correction(full=solved.step.float())
