"""The quadratic objective of one linear, and products with its normal matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.streams.distributed import shared_rows


@dataclass(frozen=True)
class Term:
    """One domain's term of the objective: Gram matrix `[in, in]`, residual `[out, in]`.

    The residual is `sum (y - W_start x) x^T`; `scale` is the weight s of the term.
    """

    gram: Tensor
    residual: Tensor
    metric: Metric = PLAIN
    scale: float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        """`s S x`, which may be x itself."""
        measured = self.metric(x)
        return measured if self.scale == 1 else self.scale * measured


@dataclass(frozen=True)
class ColumnProblem:
    """The objective of one linear: directions `[U, out, in]` and terms, all of one dtype."""

    directions: Tensor
    terms: Sequence[Term]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The normal matrix `[U * in, U * in]`, computed in a dtype."""
        directions = self.directions.to(dtype)
        count, _, columns = directions.shape
        matrix = directions.new_zeros(count, columns, count, columns)
        for term in self.terms:
            gram = term.gram.to(dtype)
            for v in range(count):
                weighted = term.apply(directions[v])
                for u in range(v + 1):
                    matrix[u, :, v].addcmul_(directions[u].T @ weighted, gram)
        for v in range(count):
            for u in range(v):
                matrix[v, :, u] = matrix[u, :, v].T
        return matrix.reshape(count * columns, count * columns)

    def product(self, step: Tensor) -> Tensor:
        """`A d` for d `[U, in]`, without forming A: `2 * out * in^2` flops per term, plus S's."""
        deviation = torch.zeros_like(self.directions[0])
        for direction, own in zip(self.directions, step.to(deviation), strict=True):
            deviation.addcmul_(direction, own)
        return sum_rows(self.directions, self.reaction(deviation)).to(step)

    def reaction(self, deviation: Tensor) -> Tensor:
        """`sum_k s_k S_k V G_k` for V `[out, in]`."""
        return add_reactions(torch.zeros_like(deviation), self.terms, deviation)

    def right_hand_side(self) -> Tensor:
        """The right-hand side b, `[U, in]`."""
        return sum_rows(self.directions, pull(self.terms))

    def column_blocks(self) -> Tensor:
        """The U x U diagonal blocks of A, one per input column: `[in, U, U]`."""
        count, _, columns = self.directions.shape
        blocks = self.directions.new_zeros(columns, count, count)
        for term in self.terms:
            gram = term.gram.diagonal()
            for v in range(count):
                weighted = term.apply(self.directions[v])
                for u in range(v + 1):
                    # One pair at a time: an einsum over all would run many tiny, slow products.
                    blocks[:, u, v] += (self.directions[u] * weighted).sum(0) * gram
        for v in range(count):
            for u in range(v):
                blocks[:, v, u] = blocks[:, u, v]
        return blocks


def pull(terms: Sequence[Term]) -> Tensor:
    """`sum_k s_k S_k R_k`, `[out, in]`: minus half the gradient at the start."""
    total = torch.zeros_like(terms[0].residual)
    for term in terms:
        total += term.apply(term.residual)
    return total


def add_reactions(total: Tensor, terms: Sequence[Term], deviation: Tensor) -> Tensor:
    """Add `sum_k s_k S_k V G_k` for V `[out, in]` to a tensor, in place; returns it."""
    for term in terms:
        total += term.apply(_times(deviation, term.gram))
    return total


def _times(deviation: Tensor, gram: Tensor) -> Tensor:
    """`V G`; processes share its rows."""
    return shared_rows(len(deviation), lambda rows: deviation[rows] @ gram)


def sum_rows(directions: Tensor, other: Tensor) -> Tensor:
    """`(T_u * other)` summed over rows, `[U, in]`, without a `[U, out, in]` product."""
    return torch.stack([(direction * other).sum(0) for direction in directions])
