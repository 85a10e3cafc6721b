"""The cost of a linear's fit: flops and bytes as functions of plain sizes.

Each function stands for one operation of this package and must change with it: `moments` (sums over
tokens), `metric` (products with a metric), `linear` and `solver` (the solution and its judgement).
Counted are the leading terms: products of matrices, factorisations, and passes over weights or
activations. A multiplication and the addition that follows it count as two flops.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mergekit_dam.choices import CorrectionKind
from mergekit_dam.fitting.correction import RIDGES
from mergekit_dam.fitting.correction_problem import REFINEMENTS
from mergekit_dam.fitting.low_rank import LEFT, OVERSAMPLED, POWERS, RIGHT
from mergekit_dam.fitting.metric import kept_as_rows
from mergekit_dam.fitting.solver import DENSE_LIMIT, ROUGH, precision
from mergekit_dam.fitting.symmetric import computed

Speed = Literal["forward", "fp32", "fp64", "cholesky", "elements"]
"""What the time of some work depends on: the speed of the models' blocks, of products in one
precision, of factorisations in fp32 (all in flops), or of passes over elements of tensors."""

Work = Counter[tuple[str, Speed]]
"""Flops, or elements, by kind of work and by the speed that its time depends on."""

ITERATIONS = 25
"""Iterations of conjugate gradients without a factorisation, about, at the tolerance of fp32."""

FLOAT = 4
"""Bytes of a number in fp32."""
DOUBLE = 8
"""Bytes of a number in fp64."""


@dataclass(frozen=True)
class MetricSize:
    """Sizes of one model's metric on the outputs of one linear.

    Attributes:
        out: output features of the linear.
        tokens: tokens whose gradients make up the metric.
    """

    out: int
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of its factors: one per token, or one per feature if it is kept as a matrix."""
        return self.tokens if kept_as_rows(self.tokens, self.out) else self.out

    @property
    def making(self) -> int:
        """Flops of `Metric.of_gradients`."""
        as_rows = kept_as_rows(self.tokens, self.out)
        return 0 if as_rows else 2 * self.tokens * computed(self.out)

    @property
    def product(self) -> int:
        """Flops of `S x` per column of x."""
        as_rows = kept_as_rows(self.tokens, self.out)
        return (2 if as_rows else 1) * 2 * self.rows * self.out

    @property
    def square(self) -> int:
        """Flops of `y^T S y` per token."""
        return 2 * self.rows * self.out

    @property
    def bytes(self) -> int:
        """Bytes of its factors."""
        return FLOAT * self.rows * self.out


@dataclass(frozen=True)
class LinearSize:
    """Sizes of the fit of one linear.

    Attributes:
        out, columns: output and input features.
        unknowns: unknowns per column.
        sources: tensors that are merged.
        models: models with calibration data.
        metric: sizes of each model's metric; None where errors are measured plainly.
        by_column: every column has unknowns of its own; otherwise all columns share them.
        correction: kind of the correction that follows.
        rank: rank of a correction of low rank.
    """

    out: int
    columns: int
    unknowns: int
    sources: int
    models: int
    metric: MetricSize | None = None
    by_column: bool = True
    correction: CorrectionKind = "none"
    rank: int = 0

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.out * self.columns

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums and products."""
        return precision(self.unknowns * self.columns)

    @property
    def terms(self) -> int:
        """Terms of the quadratic: models that are measured alike share one."""
        return 1 if self.metric is None else self.models

    @property
    def factorised(self) -> bool:
        """Whether the whole normal matrix is formed and factorised."""
        exact = self.by_column and self.correction == "none"
        return exact and self.unknowns * self.columns <= DENSE_LIMIT


def input_moments(columns: int, tokens: int, chunks: int) -> Work:
    """Work of `InputMoments.add` for some tokens in some chunks."""
    return Work(
        {
            ("Gram matrices", "fp32"): 2 * tokens * computed(columns),
            ("Gram matrices", "elements"): chunks * computed(columns),
        }
    )


def linear_moments(size: LinearSize, tokens: int, chunks: int, *, squares: int) -> Work:
    """Work of `LinearMoments.add` for some tokens, without the moments of its input.

    Args:
        squares: how many squares are summed in metrics: none, those of targets that are the
            teachers' outputs, or those of both.
    """
    work = Work(
        {
            ("Gram matrices", "fp32"): 2 * tokens * size.weight,
            ("Gram matrices", "elements"): chunks * size.weight,
        }
    )
    if size.metric is not None:
        work["metrics", "fp32"] = squares * tokens * size.metric.square
    return work


def making_metrics(metric: MetricSize | None, models: int) -> Work:
    """Work of the metrics of all models."""
    return Work({("metrics", "fp32"): 0 if metric is None else models * metric.making})


def judgement(size: LinearSize, held_out_tokens: int) -> Work:
    """Work of judging the start and the fit on held-out tokens, and of merging both."""
    square = 0 if size.metric is None else size.metric.square
    work = Work()
    # `LinearTokens.add` measures what the teachers put out; `error` is called twice.
    work["metrics", "fp32"] = held_out_tokens * square
    work["judging", "fp32"] = 2 * held_out_tokens * (2 * size.weight + square)
    work["merging", "elements"] = 3 * size.sources * size.weight
    return work


def solution(size: LinearSize) -> Work:
    """Work of solving for the coefficients of one weight, its loss at the start included."""
    unknowns, columns, weight = size.unknowns, size.columns, size.weight
    speed: Speed = "fp64" if size.dtype == torch.float64 else "fp32"
    metric = 0 if size.metric is None else size.metric.product * columns
    product = 2 * weight * columns
    work = Work()
    work["solves", "elements"] = 4 * (unknowns + 2) * weight * size.sources
    terms = size.terms
    if size.correction == "none":
        # The metric is applied to the residual.
        work["solves", speed] = terms * metric
    else:
        terms, metric = 1, 0
    # The residual has a product of weight and Gram matrix, for every term.
    work["solves", speed] += terms * product
    pairs = unknowns * (unknowns + 1) // 2
    if not size.by_column:
        work["solves", speed] += terms * unknowns * (product + metric)
        work["solves", "elements"] += 2 * unknowns**2 * weight
        return work
    if size.factorised:
        work["solves", "fp32"] += terms * (pairs * product + unknowns * metric)
        work["solves", "elements"] += terms * pairs * 2 * columns * columns
        work["solves", "cholesky"] = (unknowns * columns) ** 3 // 3
        iterations = 2 if speed == "fp64" else 1
    elif size.correction != "none":
        iterations = ROUGH
    else:
        iterations = 1 + ITERATIONS
    work["solves", speed] += terms * iterations * (product + metric)
    work["solves", "elements"] += iterations * (2 * unknowns + 2) * weight
    return work


def correction(size: LinearSize, held_out_tokens: int) -> Work:
    """Work of a linear's correction, every ridge of which is tried, and of judging them."""
    work = Work()
    if size.correction == "none":
        return work
    columns, weight, metric = size.columns, size.weight, size.metric
    single = metric is not None or size.dtype == torch.float32
    speed: Speed = "fp32" if single else "fp64"
    product = 2 * weight * columns
    # The residual at the weight; two triangular solves for every ridge.
    work["corrections", speed] = (1 + len(RIDGES)) * product
    work["corrections", "cholesky"] = len(RIDGES) * columns**3 // 3
    if size.correction == "low_rank":
        work["corrections", speed] += _factors(size)
        work["merging", "elements"] += size.rank * weight
    elif metric is not None:
        # A product with the quadratic before the first step and one in every step, which a division
        # by the shifted Gram matrix precedes.
        measured = product + metric.product * columns
        work["corrections", speed] += size.terms * (2 + REFINEMENTS) * measured
        work["corrections", speed] += REFINEMENTS * product
    square = 0 if metric is None else metric.square
    work["judging", "fp32"] = (1 + len(RIDGES)) * held_out_tokens * (2 * weight + square)
    work["merging", "elements"] += (1 + len(RIDGES)) * size.sources * weight
    return work


def _factors(size: LinearSize) -> int:
    """Flops of the factors of a correction of low rank, given the minimiser that they are of."""
    columns, weight, rank, metric = size.columns, size.weight, size.rank, size.metric
    subspace = min(rank + OVERSAMPLED, size.out, columns)
    products = 2 * (POWERS + 1) + 2
    work = 2 * products * weight * subspace + rank * columns**2
    if metric is None:
        return work
    # Either factor: its right-hand side, what is held in the quadratic, then the products: one with
    # the quadratic before the first step and one in every step.
    cross, gram = 2 * 2 * rank * weight, 2 * rank * columns**2
    left = cross + 2 * gram + (2 + LEFT) * rank * metric.product
    right = cross + rank * metric.product + (2 + RIGHT) * gram
    return work + size.terms * (left + right) + RIGHT * gram


def gathering_bytes(sizes: Sequence[LinearSize]) -> int:
    """Bytes of the moments of linears that see one input, while they are summed."""
    first = sizes[0]
    if first.metric is not None or first.models == 1:
        return moments_bytes(sizes)
    # The moments of one model, beside the sum over the models before it.
    own = first.columns**2 + sum(size.weight for size in sizes)
    return moments_bytes(sizes) + first.dtype.itemsize * own


def moments_bytes(sizes: Sequence[LinearSize]) -> int:
    """Bytes of the moments of linears that see one input, when all are summed."""
    first = sizes[0]
    gram, cross = first.columns**2, sum(size.weight for size in sizes)
    if first.metric is not None:
        return first.dtype.itemsize * first.models * (gram + cross)
    # Each linear has its own copy of what is summed over models, as it weighs them in its own way.
    return first.dtype.itemsize * (len(sizes) * gram + cross)


def solution_bytes(size: LinearSize) -> int:
    """Bytes that solving for one weight takes beside its moments."""
    unknowns, columns, number = size.unknowns, size.columns, size.dtype.itemsize
    # Directions, one residual per term, and a product on its way: the average has gone by then.
    work = number * size.weight * (unknowns + size.terms + 2)
    if not size.factorised:
        blocks = 3 * DOUBLE * columns * unknowns**2 if size.by_column else 0
        return work + number * size.weight + blocks
    # The factor takes the place of the matrix, which is fp32, as are copies of what it is made of.
    copies = 0 if number == FLOAT else FLOAT * (unknowns * size.weight + columns**2)
    return work + copies + FLOAT * ((unknowns * columns) ** 2 + columns**2)


def correction_bytes(size: LinearSize) -> int:
    """Bytes that a linear's correction takes beside its moments."""
    if size.correction == "none":
        return 0
    number, weight = size.dtype.itemsize, size.weight
    copies = 0
    if size.metric is not None and number == DOUBLE:
        number, copies = FLOAT, FLOAT * size.terms * (size.columns**2 + weight)
    # Two factors: the best ridge's so far, and the one that is tried.
    grams = 2 * number * size.columns**2 + copies
    # The residuals of all terms together, two whitened minimisers, and one as a matrix; or a whole
    # one with the residuals of the terms and the vectors of conjugate gradients.
    refined = size.metric is not None and size.correction == "full"
    vectors = number * weight * (size.terms + 8 if refined else 4)
    merged = 3 * FLOAT * weight
    return grams + vectors + merged
