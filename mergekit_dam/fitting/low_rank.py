"""Corrections of low rank: factors X `[out, rank]` and C `[rank, in]` of D.

In the plain metric the best ones are the leading singular vectors of D, whitened by its inputs. In
other metrics they are where an alternation begins: the quadratic is minimised over one factor and
then over the other. Each is a system of `rank` vectors, so that a metric or a Gram matrix never
multiplies a whole weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_dam.fitting.conjugate_gradients import conjugate_gradients
from mergekit_dam.fitting.correction_problem import CorrectionProblem, Minimiser
from mergekit_dam.fitting.tensor_cores import exact

OVERSAMPLED = 8
"""Vectors that the subspace has beyond the rank that is asked for."""

POWERS = 4
"""Times that the subspace is multiplied by the matrix and its transpose, after the first."""

LEFT, RIGHT = 5, 3
"""Iterations of conjugate gradients for either factor."""


def best_factors(
    problem: CorrectionProblem, found: Minimiser, ridge: float, rank: int
) -> tuple[Tensor, Tensor]:
    """The factors X `[out, rank]` and C `[rank, in]` whose product minimises the quadratic, about.

    Args:
        problem: The quadratic.
        found: Its minimiser in the pooled plain metric.
        ridge: The ridge of that.
        rank: At most the smaller side is taken.
    """
    left, whitened = nearest_product(found.whitened, rank)
    if problem.plain:
        return left, found.turned_back(whitened)
    with exact():
        basis, mixed = torch.linalg.qr(whitened.T)
        right = found.turned_back(basis.T)  # right (G + ridge m) right^T = 1
        left, mixed = torch.linalg.qr(_left(problem, right, left @ mixed.T, ridge))
        return left, _right(problem, found, left, mixed @ right, ridge)


def _left(problem: CorrectionProblem, right: Tensor, start: Tensor, ridge: float) -> Tensor:
    """The minimiser over X from a start, for a C whose rows are orthonormal for the inputs."""
    pull_to_zero = ridge * problem.mean * (right @ right.T)
    rhs, pairs = torch.zeros_like(start), []
    diagonal = torch.zeros(len(start), device=start.device)
    for own in problem.domains:
        rhs += own.scale * own.metric(own.residual_times(right.T))
        gram = own.scale * (right @ own.gram @ right.T)
        pairs.append((own.metric, gram))
        diagonal = diagonal + own.metric.diagonal(start) * gram.diagonal().mean()

    def product(x: Tensor) -> Tensor:
        total = x @ pull_to_zero
        for metric, gram in pairs:
            total += metric(x @ gram)
        return total

    return _solved(product, lambda x: x / diagonal[:, None], start, rhs, LEFT)


def _right(
    problem: CorrectionProblem, found: Minimiser, left: Tensor, start: Tensor, ridge: float
) -> Tensor:
    """The minimiser over C from a start, for an X of orthonormal columns."""
    rhs, mean, pairs = torch.zeros_like(start), torch.zeros_like(left.T @ left), []
    for own in problem.domains:
        measured = own.scale * own.metric(left)
        rhs += own.times_residual(measured)
        inner = left.T @ measured
        pairs.append((inner, own))
        mean += inner * (own.mean / problem.mean)
    factor = torch.linalg.cholesky((mean + mean.T) / 2)

    def product(c: Tensor) -> Tensor:
        total = ridge * problem.mean * c
        for inner, own in pairs:
            total += inner @ (c @ own.gram)
        return total

    def divided(c: Tensor) -> Tensor:
        return found.divided(torch.cholesky_solve(c, factor))

    return _solved(product, divided, start, rhs, RIGHT)


def _solved(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    start: Tensor,
    rhs: Tensor,
    limit: int,
) -> Tensor:
    target = 1e-9 * float(rhs.norm())  # there is nothing left to divide by then
    left = rhs - product(start)
    return conjugate_gradients(
        product, precondition, start.clone(), left, target=target, limit=limit
    ).step


def nearest_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of a rank, about, by subspace iteration (Halko et al., arXiv 0909.4061).

    Args:
        matrix: `[out, in]`.
        rank: at most the smaller side is taken.

    Returns:
        Orthonormal columns `[out, rank]`, the leading first, and rows `[rank, in]`.
    """
    size = min(rank + OVERSAMPLED, *matrix.shape)
    # Drawn on the host: every device begins with the same numbers.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float64)
    with exact():
        basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
        for _ in range(POWERS):
            basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
        within = basis.T @ matrix
        vectors = torch.linalg.eigh(within @ within.T).eigenvectors[:, -rank:].flip(1)
        left = basis @ vectors
        return left, left.T @ matrix
