"""The work of a linear's fit: flops, and passes over elements, as functions of plain sizes.

Each function stands for one operation of this package and must change with it: `moments` (sums over
tokens), `metric` (products with a metric), `linear` and `solver` (the solution and its judgement).
Counted are the leading terms: products of matrices, factorisations, and passes over weights or
activations. A multiplication and the addition that follows it count as two flops.
"""

from collections import Counter
from typing import Literal

import torch

from mergekit_dam.fitting.correction import RIDGES
from mergekit_dam.fitting.correction_problem import REFINEMENTS
from mergekit_dam.fitting.low_rank import LEFT, OVERSAMPLED, POWERS, RIGHT
from mergekit_dam.fitting.sizes import LinearSize, MetricSize
from mergekit_dam.fitting.solver import ROUGH
from mergekit_dam.fitting.symmetric import computed

Speed = Literal["forward", "fp32", "fp64", "cholesky", "elements"]
"""What the time of some work depends on: the speed of the models' blocks, of products in one
precision, of factorisations in fp32 (all in flops), or of passes over elements of tensors."""

Work = Counter[tuple[str, Speed]]
"""Flops, or elements, by kind of work and by the speed that its time depends on."""

ITERATIONS = 25
"""Iterations of conjugate gradients without a factorisation, about, at the tolerance of fp32."""


def input_moments(columns: int, tokens: int, chunks: int) -> Work:
    """Work of `InputMoments.add` for some tokens in some chunks."""
    return Work(
        {
            ("Gram matrices", "fp32"): 2 * tokens * (computed(columns) + columns),
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
            ("Gram matrices", "fp32"): 2 * tokens * (size.weight + size.out),
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
