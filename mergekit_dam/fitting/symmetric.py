"""Symmetric matrices: sums of `x^T x` at little more than half the work, and Cholesky in place."""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCKS = 8
"""Blocks of rows of a sum: with b of them, (b + 1) / 2b of the products are computed."""

_NARROWEST = 128
"""Fewest columns of a block; smaller products take as long as these."""


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add `rows^T rows` to a symmetric matrix `[n, n]`, on and below its diagonal alone.

    Args:
        total: Some entries above its diagonal are added to as well; `mirror` makes them right.
        rows: `[tokens, n]`. Products have its dtype, the sum that of `total`.
    """
    for first, end in blocks(len(total)):
        total[first:end, :end] += rows[:, first:end].T @ rows[:, :end]


def mirror(total: Tensor) -> None:
    """Set what is above the diagonal to what is below it."""
    for first, end in blocks(len(total)):
        total[:first, first:end] = total[first:end, :first].T
        own = total[first:end, first:end]
        own.copy_(own.tril() + own.tril(-1).T)


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """First and end of each block of rows of a sum."""
    width = max(_NARROWEST, -(-size // _BLOCKS))
    for first in range(0, size, width):
        yield first, min(size, first + width)


def computed(size: int) -> int:
    """Entries that `add_products` computes of a sum `[size, size]`."""
    return sum((end - first) * end for first, end in blocks(size))


def cholesky(matrix: Tensor) -> tuple[Tensor, bool]:
    """The lower factor of a symmetric matrix, in its memory, and whether the matrix has none."""
    # Factorisations store matrices by columns, as the transpose does: it is not copied.
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))
    return factor, bool(info)
