"""Preconditioned conjugate gradients, for vectors of any shape."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""A linear map from vectors to vectors of one shape."""


@dataclass(frozen=True)
class Ended:
    """Where conjugate gradients ended.

    Attributes:
        step: The approximate solution.
        residual: The right-hand side less the product of the matrix and the solution.
        iterations: Number of iterations.
        converged: Whether they stopped before their limit.
    """

    step: Tensor
    residual: Tensor
    iterations: int
    converged: bool


def conjugate_gradients(
    product: Operator,
    precondition: Operator,
    step: Tensor,
    residual: Tensor,
    *,
    target: float,
    limit: int,
) -> Ended:
    """Solve a positive definite system from a start.

    Args:
        product: The matrix.
        precondition: Approximate inverse of the matrix.
        step: Where they begin; changed in place.
        residual: Residual of that start; changed in place.
        target: Norm of the residual at which they stop.
        limit: Largest number of iterations.
    """
    direction, previous, iterations = residual, None, 0
    while (left := float(residual.norm())) > target and iterations < limit:
        conditioned = precondition(residual)
        slope = (residual * conditioned).sum()
        direction = (
            conditioned if previous is None else conditioned + (slope / previous) * direction
        )
        previous = slope
        curvature = product(direction)
        length = slope / (direction * curvature).sum()
        step += length * direction
        residual -= length * curvature
        iterations += 1
    return Ended(step, residual, iterations, converged=not left > target)
