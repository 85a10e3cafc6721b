"""The quadratic of a correction, and its minimisers at several ridges.

The correction D `[out, in]` of a merged weight W minimises, in the metric of the fit,

    sum_k s_k (<S_k D G_k, D> - 2 <S_k R_k, D>)  +  ridge * m * |D|^2,    R_k = sum (y - W x) x^T,

with m the mean diagonal of the quadratic. In the plain metric that is `D = R (G + ridge m)^-1`. In
others, that of the pooled plain metric is where conjugate gradients on the quadratic itself begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_dam.fitting.conjugate_gradients import conjugate_gradients
from mergekit_dam.fitting.metric import Metric
from mergekit_dam.fitting.moments import (
    LinearMoments,
    measured_plainly,
    plain_weights,
    pooled,
)
from mergekit_dam.fitting.problem import Term, add_reactions, pull
from mergekit_dam.fitting.symmetric import cholesky
from mergekit_dam.streams.distributed import shared_rows

REFINEMENTS = 4
"""Iterations of conjugate gradients for a whole matrix."""


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
        return self.turned_back(self.whitened)

    def turned_back(self, rows: Tensor) -> Tensor:
        """`rows L^-1`."""
        return _divided(self.factor, rows, upper=False)

    def divided(self, rows: Tensor) -> Tensor:
        """`rows (G + ridge m)^-1`."""
        return torch.cholesky_solve(rows.T, self.factor).T


@dataclass(frozen=True)
class Domain:
    """One domain's term of the quadratic. Its residual R `[out, in]` is not formed as a whole.

    Attributes:
        moments: Sums over its tokens.
        weight: W, `[out, in]`.
        bias: Merged bias `[out]`, or None.
        dtype: Dtype of the quadratic; products with R have that of the moments.
    """

    moments: LinearMoments
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def metric(self) -> Metric:
        """S."""
        return self.moments.metric

    @property
    def scale(self) -> float:
        """The weight s of the term."""
        return self.moments.scale

    @property
    def gram(self) -> Tensor:
        """G, `[in, in]`, on the device."""
        return self._gram.to(self.moments.inputs.x_sum.device)

    @property
    def mean(self) -> Tensor:
        """Mean diagonal of G."""
        return self.moments.inputs.diagonal.to(self.dtype).mean()

    @cached_property
    def _gram(self) -> Tensor:
        """G where the moments are kept."""
        return self.moments.inputs.gram.to(self.dtype)

    @property
    def term(self) -> Term:
        """The term with the whole residual."""
        residual = self.moments.residual(self.weight, self.bias).to(self.dtype)
        return Term(self.gram, residual, self.metric, self.scale)

    def residual_times(self, x: Tensor) -> Tensor:
        """`R x`, `[out, n]`, for x `[in, n]`."""
        cross, inputs = self.moments.cross_on_device, self.moments.inputs
        own = x.to(cross)
        product = cross @ own - self.weight.to(cross) @ (inputs.gram_on_device @ own)
        if self.bias is not None:
            product -= torch.outer(self.bias.to(cross), inputs.x_sum.to(cross) @ own)
        return product.to(x)

    def times_residual(self, x: Tensor) -> Tensor:
        """`x^T R`, `[n, in]`, for x `[out, n]`."""
        cross, inputs = self.moments.cross_on_device, self.moments.inputs
        own = x.to(cross).T
        product = own @ cross - (own @ self.weight.to(cross)) @ inputs.gram_on_device
        if self.bias is not None:
            product -= torch.outer(own @ self.bias.to(cross), inputs.x_sum.to(cross))
        return product.to(x)


@dataclass(frozen=True)
class CorrectionProblem:
    """The quadratic of a correction, without its ridge.

    Attributes:
        moments: One per domain, or a single one where errors are measured plainly.
        weight: W, `[out, in]`.
        bias: Merged bias `[out]` that the linear adds, or None.
        dtype: Dtype of the solutions.
    """

    moments: Sequence[LinearMoments]
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """Whether errors are measured plainly."""
        return measured_plainly(self.moments)

    @property
    def domains(self) -> list[Domain]:
        """The terms."""
        return [Domain(own, self.weight, self.bias, self.dtype) for own in self.moments]

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factor of a shifted Gram matrix."""
        return self.dtype.itemsize * self.weight.shape[1] ** 2

    @cached_property
    def weights(self) -> list[float]:
        """Weights of the terms in one plain metric, which take a pass over each metric."""
        return plain_weights(self.moments)

    @cached_property
    def residual(self) -> Tensor:
        """The residuals of all terms in one, in the plain metric, `[out, in]`."""
        whole = pooled(self.moments, self.weights)
        return whole.residual(self.weight, self.bias).to(self.dtype)

    @cached_property
    def mean(self) -> float:
        """Mean diagonal of the quadratic."""
        means = (own.inputs.diagonal.mean(dtype=torch.float64) for own in self.moments)
        return sum(weight * float(mean) for weight, mean in zip(self.weights, means, strict=True))

    def shifted(self, ridge: float) -> Tensor:
        """A new matrix `G + ridge m`, of the Gram matrices of all terms in the plain metric."""
        total = self.moments[0].inputs.gram_on_device * self.weights[0]
        for own, weight in zip(self.moments[1:], self.weights[1:], strict=True):
            total.add_(own.inputs.gram_on_device, alpha=weight)
        total.diagonal().add_(ridge * self.mean)
        return total.to(self.dtype)

    def minimiser(self, ridge: float) -> Minimiser | None:
        """The minimiser in the pooled plain metric.

        Args:
            ridge: Strength of the pull to zero, relative to the mean diagonal.

        Returns:
            None if the inputs have no energy, or the shifted Gram matrix cannot be factorised in
            its dtype.
        """
        if self.mean == 0:
            return None
        residual = self.residual  # before there is a factor beside it
        factor, failed = cholesky(self.shifted(ridge))
        if failed:
            return None
        return Minimiser(_divided(factor.mT, residual, upper=True), factor)

    def refined(self, found: Minimiser, ridge: float) -> Tensor:
        """The minimiser of the quadratic itself, about, `[out, in]`.

        Args:
            found: The minimiser in the pooled plain metric at this ridge.
        """
        start = found.matrix
        if self.plain:
            return start
        terms = [own.term for own in self.domains]
        rhs = pull(terms)

        def product(x: Tensor) -> Tensor:
            return add_reactions(ridge * self.mean * x, terms, x)

        ended = conjugate_gradients(
            product,
            found.divided,
            start.clone(),
            rhs - product(start),
            target=1e-9 * float(rhs.norm()),  # there is nothing left to divide by then
            limit=REFINEMENTS,
        )
        return ended.step


def _divided(factor: Tensor, rows: Tensor, *, upper: bool) -> Tensor:
    """`rows factor^-1` for a triangular factor; processes share the rows."""

    def made(own: slice) -> Tensor:
        divided: Tensor = torch.linalg.solve_triangular(factor, rows[own], upper=upper, left=False)
        return divided

    return shared_rows(len(rows), made)
