"""The product of two thin matrices that is nearest to a matrix."""

import torch
from torch import Tensor

from mergekit_dam.fitting.tensor_cores import exact

OVERSAMPLED = 8
"""Vectors that the subspace has beyond the rank that is asked for."""

POWERS = 4
"""Times that the subspace is multiplied by the matrix and its transpose, after the first."""


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
