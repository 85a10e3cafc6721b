"""Sizes of the fit of one linear, from which its cost follows: `costs` (work) and `memory`."""

from dataclasses import dataclass

import torch

from mergekit_dam.choices import CorrectionKind
from mergekit_dam.fitting.metric import kept_as_rows
from mergekit_dam.fitting.solver import DENSE_LIMIT, precision
from mergekit_dam.fitting.symmetric import computed

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
