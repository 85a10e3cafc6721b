"""The quadratic of a correction, and its minimisers at several ridges.

The correction D `[out, in]` of a merged weight W minimises, in the metric of the fit,

    sum_k s_k (<S_k D G_k, D> - 2 <S_k R_k, D>)  +  ridge * m * |D|^2,    R_k = sum (y - W x) x^T,

with m the mean diagonal of the quadratic. In the plain metric that is `D = R (G + ridge m)^-1`. In
others, the matrix of the quadratic is replaced by the one Kronecker product that is nearest: that
of the mean metric S and the mean Gram matrix G. Then `D = S^-1 P (G + ridge m)^-1`, with
`P = sum_k s_k S_k R_k`. That is where conjugate gradients on the quadratic itself begin, with the
same product for a preconditioner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction
from mergekit_dam.fitting.conjugate_gradients import conjugate_gradients
from mergekit_dam.fitting.low_rank import nearest_product
from mergekit_dam.fitting.problem import Term, add_reactions, pooled_gram, pull

REFINEMENTS = 2
"""Iterations of these conjugate gradients. On near models two of them took a fifth off the merged
model's KL, and more took nothing."""


@dataclass(frozen=True)
class Minimiser:
    """The minimiser D `[out, in]` at one ridge.

    Attributes:
        whitened: `D L`, whose size is that of D in the metric of the inputs.
        factor: L, the lower Cholesky factor of the shifted Gram matrix.
    """

    whitened: Tensor
    factor: Tensor

    @property
    def matrix(self) -> Tensor:
        """D itself."""
        return self._turned_back(self.whitened)

    def truncated(self, rank: int) -> Correction:
        """The matrix of some rank that is nearest, in the metric of the inputs."""
        left, right = nearest_product(self.whitened, rank)
        back = self._turned_back(right)
        return Correction(right=back.float().contiguous(), left=left.float().contiguous())

    def _turned_back(self, rows: Tensor) -> Tensor:
        turned: Tensor = torch.linalg.solve_triangular(self.factor, rows, upper=False, left=False)
        return turned


@dataclass(frozen=True)
class CorrectionProblem:
    """The quadratic of a correction, without its ridge.

    Attributes:
        terms: One per domain, or a single one where errors are measured plainly.
    """

    terms: Sequence[Term]

    @property
    def plain(self) -> bool:
        """Whether errors are measured plainly."""
        return all(term.metric.factors is None for term in self.terms)

    @cached_property
    def gram(self) -> Tensor:
        """Gram matrix `[in, in]` of all terms, each by the mean of its metric."""
        return pooled_gram(self.terms)

    @cached_property
    def mean(self) -> float:
        """Mean diagonal of the quadratic."""
        return float(self.gram.diagonal().mean(dtype=torch.float64))

    def minimiser(self, ridge: float) -> Minimiser | None:
        """The minimiser.

        Args:
            ridge: Strength of the pull to zero, relative to the mean diagonal.

        Returns:
            None if the inputs have no energy, or the shifted Gram matrix cannot be factorised in
            its dtype.
        """
        if self.mean == 0:
            return None
        shifted = self.gram.clone()
        shifted.diagonal().add_(ridge * self.mean)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if bool(failed):
            return None
        whitened = torch.linalg.solve_triangular(factor.mT, self._pulled, upper=True, left=False)
        return Minimiser(whitened, factor)

    def refined(self, found: Minimiser, ridge: float) -> Minimiser:
        """Nearer to the minimiser of the quadratic itself.

        Args:
            found: The minimiser of the nearest product at this ridge.
        """
        if self.plain:
            return found
        start = found.matrix

        def product(x: Tensor) -> Tensor:
            return add_reactions(ridge * self.mean * x, self.terms, x)

        ended = conjugate_gradients(
            product,
            lambda x: self._divided(torch.cholesky_solve(x.T, found.factor).T),
            start.clone(),
            self._pull - product(start),
            target=1e-9 * float(self._pull.norm()),  # there is nothing left to divide by then
            limit=REFINEMENTS,
        )
        return Minimiser(ended.step @ found.factor, found.factor)

    @cached_property
    def _pull(self) -> Tensor:
        """P, `[out, in]`."""
        return pull(self.terms)

    @cached_property
    def _pulled(self) -> Tensor:
        """`S^-1 P`."""
        return self._divided(self._pull)

    def _divided(self, x: Tensor) -> Tensor:
        """`S^-1 x`."""
        if self.plain:
            return x
        divided: Tensor = torch.cholesky_solve(x, self._metric_factor)
        return divided

    @cached_property
    def _metric_factor(self) -> Tensor:
        """Lower Cholesky factor of the mean metric."""
        factor: Tensor = torch.linalg.cholesky(self._metric)
        return factor

    @property
    def _metric(self) -> Tensor:
        """The mean metric `[out, out]`, damped, of mean diagonal 1."""
        residual = self.terms[0].residual
        total = torch.zeros(len(residual), len(residual), device=residual.device)
        for term in self.terms:
            size = term.scale * float(term.gram.diagonal().mean(dtype=torch.float64)) / self.mean
            matrix = term.metric.matrix
            if matrix is None:  # a domain whose loss depends on no output of this linear
                total.diagonal().add_(size)
            else:
                total.add_(matrix, alpha=size)
        return ((total + total.T) / 2).to(self.gram)
