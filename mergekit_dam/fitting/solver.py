"""Exact minimisers of the quadratic objectives of the fits.

The column fit of one linear minimises over the step d `[U, in]` away from its start

    sum_k s_k (<S_k V G_k, V> - 2 <S_k V, R_k>)  +  ridge * mean(diag A) * |d|^2,
    V = sum_u T_u diag(d_u),

by the linear system `A d = b` with `A[(u,p),(v,q)] = sum_k s_k (T_u^T S_k T_v)[p,q] G_k[p,q]` and
`b[(u,p)] = sum_k s_k (T_u * S_k R_k)[:, p].sum()`. Term k belongs to one domain and has the metric
S_k of its errors; terms in the plain metric may be summed into one beforehand.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_dam.fitting.conjugate_gradients import Operator, conjugate_gradients
from mergekit_dam.fitting.problem import ColumnProblem, sum_rows
from mergekit_dam.fitting.symmetric import cholesky
from mergekit_dam.fitting.tensor_cores import exact

DENSE_LIMIT = 12288
"""Largest number of unknowns whose normal matrix is formed and factorised (600 MB in fp32)."""

FP64_LIMIT = 6144
"""Largest number of unknowns with sums and products in fp64; fp32 halves memory and time."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative residual at which conjugate gradients stop, by the dtype of their products.

At 1e-3, a fit has 0.9999 of its gain after a third of the iterations that 1e-5 takes.
"""

MAX_ITERATIONS = 1000

ROUGH = 2
"""Iterations of conjugate gradients where a correction follows: it repairs what they leave."""


def precision(unknowns: int) -> torch.dtype:
    """The dtype of a problem's sums, directions and products, by its number of unknowns."""
    return torch.float64 if unknowns <= FP64_LIMIT else torch.float32


@dataclass(frozen=True)
class Solution:
    """The minimiser, and how it was found.

    Attributes:
        step: Step from the start, fp64 `[U, in]` (`[U, 1]` for one coefficient per tensor).
        method: "cholesky" (of the whole matrix), "conjugate gradients" (without forming it) or
            "none" (nothing to fit).
        gain: Decrease of the quadratic, without its ridge, from the start.
        iterations: Number of iterations of conjugate gradients, preconditioned by a factorisation.
        residual: `|A d - b| / |b|` of the regularised system.
        converged: Whether conjugate gradients stopped before their limit.
    """

    step: Tensor
    method: str
    gain: float = 0.0
    iterations: int = 0
    residual: float = 0.0
    converged: bool = True

    def statistics(self) -> dict[str, str | int | float]:
        """Statistics of the solution, for the report."""
        found: dict[str, str | int | float] = {
            "method": self.method,
            "iterations": self.iterations,
            "residual": self.residual,
        }
        return found if self.converged else {**found, "stopped": self.limit_reached}

    @property
    def limit_reached(self) -> str:
        """The message that conjugate gradients stopped at their limit, for log and report."""
        return (
            f"conjugate gradients stopped at their limit of {self.iterations} iterations, with a "
            f"relative residual of {self.residual:.1e}; a larger `ridge` makes them converge"
        )


def solve_columns(
    problem: ColumnProblem, ridge: float, *, dense_limit: int = DENSE_LIMIT, rough: bool = False
) -> Solution:
    """Solve for one unknown per direction and input column.

    Conjugate gradients run on products in the problem's precision. Their preconditioner is the
    Cholesky factor of the whole matrix in fp32, which leaves two or three iterations. If the
    matrix is too large to be formed, the factors of the U x U blocks of its columns take its place.

    Args:
        ridge: Ridge, relative to the mean of A's diagonal.
        dense_limit: Largest number of unknowns for which the matrix is formed.
        rough: Whether to stop after a few iterations, without ever forming the matrix.
    """
    rhs = problem.right_hand_side().double()
    if rhs.numel() <= dense_limit and not rough:
        factorised, method = _factorised(problem, ridge), "cholesky"
    else:
        factorised, method = _factorised_columns(problem, ridge), "conjugate gradients"
    if factorised is None:
        return _nothing(rhs)
    if rough:
        solution = _conjugate_gradients(problem, rhs, *factorised, method, limit=ROUGH)
        return replace(solution, converged=True)
    with exact():
        return _conjugate_gradients(problem, rhs, *factorised, method, limit=MAX_ITERATIONS)


def _factorised(problem: ColumnProblem, ridge: float) -> tuple[float, Operator] | None:
    """The ridge's shift, and the inverse of the whole shifted matrix, by Cholesky in fp32.

    Cholesky runs in fp64 if the matrix is not positive definite in fp32. Where the matrix is 0, the
    result is None.

    Raises:
        LinAlgError: The matrix is not positive definite in fp64 either.
    """
    matrix = problem.matrix(torch.float32)
    shift = ridge * float(matrix.diagonal().mean(dtype=torch.float64))
    if shift == 0:
        return None
    matrix.diagonal().add_(shift)
    factor, failed = cholesky(matrix)
    if failed:
        del matrix, factor  # frees their memory; the fp64 matrix takes twice as much
        matrix = problem.matrix(torch.float64)
        matrix.diagonal().add_(shift)
        factor, failed = cholesky(matrix)
        if failed:
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"the normal matrix of {len(matrix)} unknowns is not positive definite"
            )

    def precondition(vector: Tensor) -> Tensor:
        halfway = torch.linalg.solve_triangular(
            factor, vector.to(factor).reshape(-1, 1), upper=False
        )
        solved: Tensor = torch.linalg.solve_triangular(factor.mT, halfway, upper=True)
        return solved.reshape(vector.shape).to(vector)

    return shift, precondition


def _factorised_columns(problem: ColumnProblem, ridge: float) -> tuple[float, Operator] | None:
    """The ridge's shift, and the inverse of the U x U blocks of the matrix's columns."""
    blocks = problem.column_blocks().double()
    shift = ridge * float(blocks.diagonal(dim1=1, dim2=2).mean())
    if shift == 0:
        return None
    blocks += shift * torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    factors = torch.linalg.cholesky(blocks)

    def precondition(vector: Tensor) -> Tensor:
        return torch.cholesky_solve(vector.T[:, :, None], factors)[:, :, 0].T

    return shift, precondition


def _conjugate_gradients(
    problem: ColumnProblem,
    rhs: Tensor,
    shift: float,
    precondition: Operator,
    method: str,
    *,
    limit: int,
) -> Solution:
    """Preconditioned conjugate gradients from a step of 0; vectors are fp64."""
    ended = conjugate_gradients(
        lambda step: problem.product(step).add_(step, alpha=shift),
        precondition,
        torch.zeros_like(rhs),
        rhs.clone(),
        target=TOLERANCE[problem.directions.dtype] * float(rhs.norm()),
        limit=limit,
    )
    step, residual = ended.step, ended.residual
    # The step solves `(A + shift) d = b - residual`, so the residual enters the gain.
    gain = _gain(step, rhs, shift) + float((step * residual).sum())
    # If the start is already the minimum, rhs is 0: the bound avoids 0 / 0.
    relative = float(residual.norm() / rhs.norm().clamp_min(1e-300))
    return Solution(step, method, gain, ended.iterations, relative, ended.converged)


def _nothing(rhs: Tensor) -> Solution:
    return Solution(torch.zeros_like(rhs), "none")


def _gain(step: Tensor, rhs: Tensor, shift: float) -> float:
    """`2 <b, d> - <A d, d>` for the solution d of `(A + shift) d = b`."""
    return float((rhs * step).sum() + shift * step.square().sum())


def solve_tensor(problem: ColumnProblem, ridge: float) -> Solution:
    """Solve for one unknown per direction: the column system, summed over all columns."""
    rows = []
    for direction in problem.directions:
        reaction = problem.reaction(direction)
        rows.append(sum_rows(problem.directions, reaction).sum(1, dtype=torch.float64))
    rhs = problem.right_hand_side().sum(1, dtype=torch.float64)
    return solve_small(torch.stack(rows)[None], rhs[None], ridge)


def solve_small(matrix: Tensor, rhs: Tensor, ridge: float) -> Solution:
    """Solve a batch of n small systems `[n, U, U] d = [n, U]` with one common ridge.

    Args:
        rhs: Right-hand sides at the start, from which d is the step.

    Returns:
        Solution with a step `[U, n]`.
    """
    shift = ridge * float(matrix.diagonal(dim1=1, dim2=2).mean())
    if shift == 0:
        return _nothing(rhs.T)
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.cholesky(matrix + shift * identity)
    step = torch.cholesky_solve(rhs[:, :, None], factor)[:, :, 0]
    return Solution(step.T.contiguous(), "cholesky", _gain(step, rhs, shift))
