"""The correction of one linear: the matrix that leaves the least error once its columns are fitted.

The correction D minimises, at the merged weight W and in the metric of the fit,

    sum_k s_k (<S_k D G_k, D> - 2 <S_k R_k, D>)  +  ridge * m * |D|^2,    R_k = sum (y - W x) x^T,

with m the mean diagonal of the quadratic. In the plain metric that is `D = R (G + ridge m)^-1`. In
others it is found by conjugate gradients, preconditioned by the factorised Gram matrix. The ridge
is chosen on held-out data. Related methods are FeatCal (arXiv 2605.13030) and RegMean++
(arXiv 2508.03121), which correct from other starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction, out_by_in
from mergekit_dam.coefficients.tensors import FittedTensor
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.moments import LinearMoments
from mergekit_dam.fitting.problem import Term
from mergekit_dam.streams.distributed import from_first

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Ridges relative to the mean diagonal, tried in this order until the held-out loss rises."""

TOLERANCE = 1e-2
"""Relative residual at which conjugate gradients stop: held-out data shows no finer differences."""

MAX_ITERATIONS = 50


def correct(
    fitted: FittedTensor, evidence: Evidence[LinearMoments], bias: Tensor | None
) -> FittedTensor:
    """Add a correction to a fitted weight, if that lowers the held-out loss.

    Args:
        fitted: The weight after the fit of its columns, whether that was kept or not.
        evidence: Moments and tokens that the columns were fitted to and judged by.
        bias: Merged bias `[out]` that the linear adds, or None.
    """
    settings, axis = fitted.sources.settings, fitted.axis
    start_weight = out_by_in(fitted.merged, axis)
    terms = [
        Term(m.inputs.gram, m.residual(start_weight, bias), m.metric, m.scale) for m in evidence.fit
    ]

    def merged(correction: Correction) -> Tensor:
        return fitted.sources.merged(fitted.coefficients, axis=axis, correction=correction)

    def held_out(correction: Correction) -> float:
        return evidence.held_out_loss(out_by_in(merged(correction), axis), bias)

    start = evidence.held_out_loss(start_weight, bias)
    best, lowest, chosen = None, start, 0.0
    solved: Tensor | None = None
    for ridge in RIDGES:
        problem = CorrectionProblem(terms, ridge)
        if problem.factor is None:  # not positive definite to its precision: nor are smaller ridges
            break
        solved = problem.solve(solved)
        candidate = Correction(solved.float())
        if settings.correction == "low_rank":
            candidate = problem.truncated(solved, settings.correction_rank)
        loss = held_out(candidate)
        if not loss < lowest:
            break
        best, lowest, chosen = candidate, loss, ridge
    # Machines may differ in the last bits of a solution; the merged model must not.
    best = from_first(lambda: None if best is None else best.cpu())
    if best is None:
        said = {"outcome": "dropped: held-out loss was not better", "held_out_start": start}
        return replace(fitted, report=replace(fitted.report, correction=said))
    said = {
        "outcome": settings.correction.replace("_", " "),
        "ridge": chosen,
        "held_out_start": start,
        "held_out": lowest,
    }
    if best.left is not None:
        said["rank"] = best.left.shape[1]
    report = replace(fitted.report, correction=said)
    return replace(fitted, merged=merged(best), correction=best, report=report)


@dataclass(frozen=True)
class CorrectionProblem:
    """The quadratic of a correction `[out, in]`, with its ridge.

    Attributes:
        terms: One per domain, or a single one where errors are measured plainly.
        ridge: Strength of the pull to zero, relative to the mean diagonal.
    """

    terms: Sequence[Term]
    ridge: float

    @cached_property
    def _gram(self) -> Tensor:
        """Gram matrix `[in, in]` of all terms, each by the mean of its metric."""
        total = torch.zeros_like(self.terms[0].gram)
        for term in self.terms:
            total.add_(term.gram, alpha=term.scale * term.metric.mean)
        return (total + total.T) / 2

    @cached_property
    def shift(self) -> float:
        """The multiple of the identity that the ridge adds."""
        return self.ridge * float(self._gram.diagonal().mean(dtype=torch.float64))

    @cached_property
    def factor(self) -> Tensor | None:
        """Lower Cholesky factor of the shifted Gram matrix; None if it has none."""
        shifted = self._gram.clone()
        shifted.diagonal().add_(self.shift)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        return None if self.shift == 0 or bool(failed) else factor

    def solve(self, start: Tensor | None = None, *, tolerance: float = TOLERANCE) -> Tensor:
        """The minimiser `[out, in]`, in the dtype of the Gram matrices.

        Args:
            start: Where conjugate gradients begin, for example the minimiser at another ridge.
            tolerance: Relative residual at which they stop.
        """
        rhs = sum(term.apply(term.residual) for term in self.terms)
        assert isinstance(rhs, Tensor)
        if len(self.terms) == 1 and self.terms[0].metric.factors is None:
            return self._preconditioned(rhs)
        step = self._preconditioned(rhs) if start is None else start.clone()
        residual = rhs - self.product(step)
        target = tolerance * float(rhs.norm())
        conditioned = self._preconditioned(residual)
        direction, slope = conditioned.clone(), (residual * conditioned).sum()
        for _ in range(MAX_ITERATIONS):
            if not float(residual.norm()) > target:
                break
            curvature = self.product(direction)
            length = slope / (direction * curvature).sum()
            step += length * direction
            residual -= length * curvature
            conditioned = self._preconditioned(residual)
            previous, slope = slope, (residual * conditioned).sum()
            direction = conditioned + (slope / previous) * direction
        return step

    def product(self, x: Tensor) -> Tensor:
        """`sum_k s_k S_k x G_k + shift x` of x `[out, in]`."""
        total = self.shift * x
        for term in self.terms:
            total += term.apply(x @ term.gram)
        return total

    def _preconditioned(self, x: Tensor) -> Tensor:
        assert self.factor is not None
        solved: Tensor = torch.cholesky_solve(x.T, self.factor)
        return solved.T

    def truncated(self, solved: Tensor, rank: int) -> Correction:
        """The matrix of some rank that is nearest to a solution, in the metric of the inputs.

        With `G + shift = L L^T`, the singular vectors of `D L` are kept, and turned back by `L^-1`.
        """
        assert self.factor is not None
        whitened = solved @ self.factor
        wide = whitened.shape[0] <= whitened.shape[1]
        square = whitened @ whitened.T if wide else whitened.T @ whitened
        vectors = torch.linalg.eigh(square).eigenvectors[:, -rank:].flip(1)
        left, right = (vectors, vectors.T @ whitened) if wide else (whitened @ vectors, vectors.T)
        back = torch.linalg.solve_triangular(self.factor, right, upper=False, left=False)
        return Correction(back.float().contiguous(), left.float().contiguous())
