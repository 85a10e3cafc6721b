"""The quadratic of a correction, and its minimisers at several ridges.

The correction D `[out, in]` of a merged weight W minimises, in the metric of the fit,

    sum_k s_k (<S_k D G_k, D> - 2 <S_k R_k, D>)  +  ridge * m * |D|^2,    R_k = sum (y - W x) x^T,

with m the mean diagonal of the quadratic. In the plain metric that is `D = R (G + ridge m)^-1`. In
others it is found by conjugate gradients. They start from, and are preconditioned by, the one
Kronecker product that is nearest: that of the mean metric and the mean Gram matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction
from mergekit_dam.fitting.conjugate_gradients import Operator, conjugate_gradients, limit_reached
from mergekit_dam.fitting.problem import Term, add_reactions, pull

TOLERANCE = 1e-2
"""Relative residual at which conjugate gradients stop: held-out data shows no finer differences."""

MAX_ITERATIONS = 50

EIGEN_LIMIT = 6144
"""Largest side of a weight for which matrices are diagonalised; beyond, they are factorised."""


@dataclass(frozen=True)
class Solved:
    """The minimiser `[out, in]` at one ridge, and how it was found.

    Attributes:
        step: The minimiser, in the dtype of the Gram matrices.
        iterations: Number of iterations of conjugate gradients.
        residual: Norm of the residual of the linear system, relative to its right-hand side.
        converged: Whether conjugate gradients stopped before their limit.
    """

    step: Tensor
    iterations: int = 0
    residual: float = 0.0
    converged: bool = True

    @property
    def limit_reached(self) -> str:
        """The message that conjugate gradients stopped at their limit, for log and report."""
        return limit_reached(self.iterations, self.residual)


@dataclass(frozen=True)
class CorrectionProblem:
    """The quadratic of a correction, without its ridge.

    Attributes:
        terms: One per domain, or a single one where errors are measured plainly.
    """

    terms: Sequence[Term]

    @property
    def plain(self) -> bool:
        """Whether the minimiser has a closed form."""
        return len(self.terms) == 1 and self.terms[0].metric.factors is None

    @cached_property
    def gram(self) -> Tensor:
        """Gram matrix `[in, in]` of all terms, each by the mean of its metric."""
        total = torch.zeros_like(self.terms[0].gram)
        for term in self.terms:
            total.add_(term.gram, alpha=term.scale * term.metric.mean)
        return (total + total.T) / 2

    @cached_property
    def mean(self) -> float:
        """Mean diagonal of the quadratic."""
        return float(self.gram.diagonal().mean(dtype=torch.float64))

    @cached_property
    def rhs(self) -> Tensor:
        """The right-hand side `[out, in]`."""
        return pull(self.terms)

    def factor(self, ridge: float) -> Tensor | None:
        """Lower Cholesky factor of the shifted Gram matrix; None if it has none in its dtype."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(ridge * self.mean)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        return None if self.mean == 0 or bool(failed) else factor

    def nearest(self, ridge: float) -> Tensor | None:
        """The minimiser of the one Kronecker product that is nearest to the quadratic.

        In the plain metric it is the minimiser itself. None if the shifted Gram matrix cannot be
        factorised in its dtype.
        """
        precondition = self._precondition(ridge)
        return None if precondition is None else precondition(self.rhs)

    def solve(self, ridge: float, start: Tensor, *, tolerance: float = TOLERANCE) -> Solved:
        """The minimiser.

        Args:
            ridge: Strength of the pull to zero, relative to the mean diagonal.
            start: What is nearest to it at this ridge; where conjugate gradients begin.
            tolerance: Relative residual at which they stop.
        """
        precondition = None if self.plain else self._precondition(ridge)
        if precondition is None:
            return Solved(start)
        size = float(self.rhs.norm())
        ended = conjugate_gradients(
            lambda step: self.product(step, ridge),
            precondition,
            start.clone(),
            self.rhs - self.product(start, ridge),
            target=tolerance * size,
            limit=MAX_ITERATIONS,
        )
        relative = float(ended.residual.norm()) / size if size else 0.0
        return Solved(ended.step, ended.iterations, relative, ended.converged)

    def product(self, x: Tensor, ridge: float) -> Tensor:
        """`sum_k s_k S_k x G_k + ridge m x` of x `[out, in]`."""
        return add_reactions(ridge * self.mean * x, self.terms, x)

    def _precondition(self, ridge: float) -> Operator | None:
        if self.mean and not self.plain and max(self.rhs.shape) <= EIGEN_LIMIT:
            return self._by_eigenvectors(ridge)
        factor = self.factor(ridge)
        if factor is None:
            return None

        def by_factors(x: Tensor) -> Tensor:
            solved: Tensor = torch.cholesky_solve(x.T, factor).T
            if not self.plain:
                solved = torch.cholesky_solve(solved, self._metric_factor)
            return solved

        return by_factors

    def _by_eigenvectors(self, ridge: float) -> Operator:
        (of_metric, rows), (of_gram, columns) = self._eigen
        shifted = of_metric[:, None] * of_gram + ridge * self.mean
        return lambda x: rows @ (rows.T @ x @ columns / shifted) @ columns.T

    @cached_property
    def _metric(self) -> Tensor:
        """The mean metric `[out, out]`, of mean diagonal 1."""
        identity = torch.eye(len(self.rhs)).to(self.rhs)
        total = torch.zeros_like(identity)
        for term in self.terms:
            total += float(term.gram.diagonal().mean(dtype=torch.float64)) * term.apply(identity)
        total /= self.mean
        return (total + total.T) / 2

    @cached_property
    def _metric_factor(self) -> Tensor:
        """Lower Cholesky factor of the mean metric, which is damped."""
        factor: Tensor = torch.linalg.cholesky(self._metric)
        return factor

    @cached_property
    def _eigen(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Eigenvalues and eigenvectors of the mean metric and of the Gram matrix."""
        own, rows = torch.linalg.eigh(self._metric)
        values, columns = torch.linalg.eigh(self.gram)
        return (own.clamp_min(0), rows), (values.clamp_min(0), columns)

    def truncated(self, solved: Tensor, ridge: float, rank: int) -> Correction | None:
        """The matrix of some rank that is nearest to a minimiser, in the metric of the inputs.

        With `G + ridge m = L L^T`, the singular vectors of `D L` are kept, and turned back by
        `L^-1`. None if there is no such L in the dtype of the Gram matrix.
        """
        factor = self.factor(ridge)
        if factor is None:
            return None
        whitened = solved @ factor
        wide = whitened.shape[0] <= whitened.shape[1]
        square = whitened @ whitened.T if wide else whitened.T @ whitened
        vectors = torch.linalg.eigh(square).eigenvectors[:, -rank:].flip(1)
        left, right = (vectors, vectors.T @ whitened) if wide else (whitened @ vectors, vectors.T)
        back = torch.linalg.solve_triangular(factor, right, upper=False, left=False)
        return Correction(right=back.float().contiguous(), left=left.float().contiguous())
