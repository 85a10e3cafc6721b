"""Exact minimisers of the quadratics that the fits lead to, in fp64.

The column fit of one linear minimises over the unknowns d `[U, in]`

    sum_k <S_k V G_k, V> - 2 <S_k V, B_k>  +  ridge * mean(diag A) * |d - d_start|^2,
    V = sum_u T_u diag(d_u),

a linear system `A d = b` with `A[(u,p),(v,q)] = sum_k (T_u^T S_k T_v)[p,q] G_k[p,q]` and
`b[(u,p)] = sum_k (T_u * S_k B_k)[:, p].sum()`. A term k holds what belongs to one domain, with
the metric S_k of its errors; terms in the plain metric may be summed into one beforehand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.fitting.metric import PLAIN, Metric

DENSE_LIMIT = 6144
"""Unknowns up to which the normal matrix is formed and factorised (300 MB in fp64)."""

TOLERANCE = 1e-9
"""Relative residual at which conjugate gradients stop."""

MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Term:
    """One domain's part of the quadratic: Gram matrix fp64 `[in, in]`, cross moment `[out, in]`.

    The cross moment is that of the targets less the origin's output.
    """

    gram: Tensor
    cross: Tensor
    metric: Metric = PLAIN


@dataclass(frozen=True)
class Solution:
    """Minimiser and how it was found.

    Attributes:
        unknowns: fp64 `[U, in]` (`[U, 1]` for one coefficient a tensor).
        method: "cholesky", "conjugate gradients" or "none" (nothing to fit).
        iterations: of conjugate gradients, else 0.
        residual: `|A d - b| / |b|` of the regularised system.
    """

    unknowns: Tensor
    method: str
    iterations: int = 0
    residual: float = 0.0

    def statistics(self) -> dict[str, str | int | float]:
        """How the solution was found, for the report."""
        return {
            "method": self.method,
            "iterations": self.iterations,
            "residual": self.residual,
        }


@dataclass(frozen=True)
class ColumnProblem:
    """The quadratic of one linear: directions fp64 `[U, out, in]` and its terms."""

    directions: Tensor
    terms: Sequence[Term]

    def matrix(self) -> Tensor:
        """The normal matrix `[U * in, U * in]`."""
        count, _, columns = self.directions.shape
        matrix = self.directions.new_zeros(count, columns, count, columns)
        for term in self.terms:
            # A sum of fp32 products is symmetric to fp32 alone; a tiny ridge asks for more.
            gram = (term.gram + term.gram.T) / 2
            for v in range(count):
                felt = term.metric(self.directions[v])
                for u in range(v + 1):
                    matrix[u, :, v] += (self.directions[u].T @ felt) * gram
        for v in range(count):
            for u in range(v):
                matrix[v, :, u] = matrix[u, :, v].T
        return matrix.reshape(count * columns, count * columns)

    def product(self, unknowns: Tensor) -> Tensor:
        """`A d` for d `[U, in]`, without forming A: `2 * out * in^2` flops a term, and S's."""
        deviation = torch.zeros_like(self.directions[0])
        for direction, unknown in zip(self.directions, unknowns, strict=True):
            deviation.addcmul_(direction, unknown)
        return _sum_rows(self.directions, self.reaction(deviation))

    def reaction(self, deviation: Tensor) -> Tensor:
        """`sum_k S_k V G_k` of V `[out, in]`."""
        total = torch.zeros_like(deviation)
        for term in self.terms:
            total += term.metric(deviation @ term.gram)
        return total

    def right_hand_side(self) -> Tensor:
        """`b`, `[U, in]`."""
        total = torch.zeros_like(self.directions[0])
        for term in self.terms:
            total += term.metric(term.cross)
        return _sum_rows(self.directions, total)

    def column_blocks(self) -> Tensor:
        """The blocks of A of one column each, `[in, U, U]`."""
        count, _, columns = self.directions.shape
        blocks = self.directions.new_zeros(columns, count, count)
        for term in self.terms:
            gram = term.gram.diagonal()
            for v in range(count):
                felt = term.metric(self.directions[v])
                for u in range(v + 1):
                    # Pair by pair: one einsum over all runs as many tiny products, slowly.
                    blocks[:, u, v] += (self.directions[u] * felt).sum(0) * gram
        for v in range(count):
            for u in range(v):
                blocks[:, v, u] = blocks[:, u, v]
        return blocks


def _sum_rows(directions: Tensor, other: Tensor) -> Tensor:
    """`(T_u * other)` summed over rows, `[U, in]`, without a `[U, out, in]` product."""
    return torch.stack([(direction * other).sum(0) for direction in directions])


def solve_columns(
    problem: ColumnProblem, start: Tensor, ridge: float, *, dense_limit: int = DENSE_LIMIT
) -> Solution:
    """One unknown per direction and input column.

    Args:
        start: fp64 `[U]`, the unknowns that the ridge pulls to.
        ridge: relative to the mean of A's diagonal.
        dense_limit: unknowns above which the solver is matrix-free.
    """
    count, _, columns = problem.directions.shape
    anchor = start[:, None].expand(-1, columns).to(problem.directions)
    rhs = problem.right_hand_side() - problem.product(anchor)
    if count * columns <= dense_limit:
        matrix = problem.matrix()
        shift = ridge * float(matrix.diagonal().mean())
        if shift == 0:
            return Solution(anchor.contiguous(), "none")
        matrix.diagonal().add_(shift)
        factor = torch.linalg.cholesky(matrix)
        step = torch.cholesky_solve(rhs.reshape(-1, 1), factor).reshape(count, columns)
        return Solution(anchor + step, "cholesky")
    blocks = problem.column_blocks()
    shift = ridge * float(blocks.diagonal(dim1=1, dim2=2).mean())
    if shift == 0:
        return Solution(anchor.contiguous(), "none")
    step, iterations, residual = _conjugate_gradients(problem, rhs, blocks, shift)
    return Solution(anchor + step, "conjugate gradients", iterations, residual)


def _conjugate_gradients(
    problem: ColumnProblem, rhs: Tensor, blocks: Tensor, shift: float
) -> tuple[Tensor, int, float]:
    """Preconditioned by the U x U blocks of each column; returns (step, iterations, residual)."""
    count = rhs.shape[0]
    blocks = blocks + shift * torch.eye(count, dtype=rhs.dtype, device=rhs.device)
    factors = torch.linalg.cholesky(blocks)

    def precondition(vector: Tensor) -> Tensor:
        return torch.cholesky_solve(vector.T[:, :, None], factors)[:, :, 0].T

    step = torch.zeros_like(rhs)
    residual = rhs.clone()
    target = TOLERANCE * float(rhs.norm())
    conditioned = precondition(residual)
    direction = conditioned.clone()
    slope = (residual * conditioned).sum()
    iterations = 0
    while float(residual.norm()) > target and iterations < MAX_ITERATIONS:
        curvature = problem.product(direction).add_(direction, alpha=shift)
        length = slope / (direction * curvature).sum()
        step += length * direction
        residual -= length * curvature
        conditioned = precondition(residual)
        previous, slope = slope, (residual * conditioned).sum()
        direction = conditioned + (slope / previous) * direction
        iterations += 1
    # At a start that is the minimum already there is nothing to relate the residual to.
    return step, iterations, float(residual.norm() / rhs.norm().clamp_min(1e-300))


def solve_tensor(problem: ColumnProblem, start: Tensor, ridge: float) -> Solution:
    """One unknown per direction: the column system summed over all columns."""
    reactions = [problem.reaction(direction) for direction in problem.directions]
    matrix = torch.einsum("uoi,voi->uv", torch.stack(reactions), problem.directions)
    rhs = problem.right_hand_side().sum(1)
    return solve_small(matrix[None], rhs[None], start, ridge)


def solve_small(matrix: Tensor, rhs: Tensor, start: Tensor, ridge: float) -> Solution:
    """A batch of n small systems `[n, U, U] d = [n, U]` with one common ridge.

    Returns:
        Solution with unknowns `[U, n]`.
    """
    shift = ridge * float(matrix.diagonal(dim1=1, dim2=2).mean())
    anchor = start.to(matrix).expand(matrix.shape[0], -1)
    if shift == 0:
        return Solution(anchor.T.contiguous(), "none")
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    gap = rhs - torch.einsum("nuv,nv->nu", matrix, anchor)
    factor = torch.linalg.cholesky(matrix + shift * identity)
    step = torch.cholesky_solve(gap[:, :, None], factor)[:, :, 0]
    return Solution((anchor + step).T.contiguous(), "cholesky")
