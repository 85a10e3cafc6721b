"""Sufficient statistics of a least-squares fit, accumulated chunk by chunk.

The number of calibration tokens enters a fit through these sums alone. Products of a chunk
are fp32, sums over chunks fp64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mergekit_dam.fitting.metric import PLAIN, Metric


@dataclass(frozen=True)
class Losses:
    """A loss on the data of the fit and on held-out data."""

    fit: float
    held_out: float


@dataclass
class LinearMoments:
    """Sums over tokens of one linear's inputs `x [in]` and targets `y [out]`, each weighted.

    Attributes:
        gram: `sum x x^T`, `[in, in]`.
        cross: `sum y x^T`, `[out, in]`.
        x_sum, y_sum: `sum x [in]` and `sum y [out]`.
        y_square: `sum |y|^2`.
        energy: `sum |teacher's own output|^2`; the target may differ from that output.
        count: sum of the tokens' weights.
        metric: in which errors, `y_square` and `energy` are measured.
    """

    gram: Tensor
    cross: Tensor
    x_sum: Tensor
    y_sum: Tensor
    y_square: float = 0.0
    energy: float = 0.0
    count: float = 0.0
    metric: Metric = PLAIN

    @classmethod
    def zeros(
        cls,
        out_features: int,
        in_features: int,
        device: torch.device,
        metric: Metric = PLAIN,
    ) -> "LinearMoments":
        """Empty sums."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(
            gram=empty(in_features, in_features),
            cross=empty(out_features, in_features),
            x_sum=empty(in_features),
            y_sum=empty(out_features),
            metric=metric,
        )

    def add(self, x: Tensor, gram: Tensor, target: Tensor, output: Tensor, weight: Tensor) -> None:
        """Add a chunk.

        Args:
            x: inputs fp32 `[tokens, in]`.
            gram: `sum weight x x^T` fp64 `[in, in]`, which linears with one input compute once.
            target: `[tokens, out]`.
            output: the teacher's own output `[tokens, out]`.
            weight: of each token, `[tokens]`.
        """
        weighted = target * weight[:, None]
        self.gram += gram
        self.cross += (weighted.T @ x).double()
        self.x_sum += (weight @ x).double()
        self.y_sum += weighted.sum(0, dtype=torch.float64)
        energy = self.metric.square(output, weight)
        self.energy += energy
        self.y_square += energy if target is output else self.metric.square(target, weight)
        self.count += float(weight.sum(dtype=torch.float64))

    def add_scaled(self, other: "LinearMoments", factor: float) -> None:
        """Add another set of sums with its tokens weighted by `factor`."""
        self.gram.add_(other.gram, alpha=factor)
        self.cross.add_(other.cross, alpha=factor)
        self.x_sum.add_(other.x_sum, alpha=factor)
        self.y_sum.add_(other.y_sum, alpha=factor)
        self.y_square += factor * other.y_square
        self.energy += factor * other.energy
        self.count += factor * other.count

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """`sum |W x + b - y|^2` in the metric, of a weight fp64 `[out, in]` and bias `[out]`."""
        felt = self.metric(weight)
        squared = ((weight @ self.gram) * felt).sum() - 2 * (felt * self.cross).sum()
        if bias is not None:
            felt_bias = self.metric(bias)
            squared += 2 * (felt_bias * (weight @ self.x_sum - self.y_sum)).sum()
            squared += self.count * (felt_bias * bias).sum()
        return max(float(squared) + self.y_square, 0.0)


@dataclass
class FeatureMoments:
    """Sums over tokens, per feature, of a scale `y = w * n + o` to fit.

    Attributes:
        n_square: `sum n^2`, `[features]`, n being the normalised input.
        n_y: `sum n * (y - o)`, with o the part of the output that the weight does not touch.
        n_sum: `sum n`.
        y_sum: `sum (y - o)`.
        y_square: `sum (y - o)^2`, per feature.
        energy: `sum |teacher's own output|^2`.
        count: sum of the tokens' weights.
    """

    n_square: Tensor
    n_y: Tensor
    n_sum: Tensor
    y_sum: Tensor
    y_square: Tensor
    energy: float = 0.0
    count: float = 0.0

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> "FeatureMoments":
        """Empty sums."""
        n_square, n_y, n_sum, y_sum, y_square = torch.zeros(
            5, features, dtype=torch.float64, device=device
        )
        return cls(n_square, n_y, n_sum, y_sum, y_square)

    def add(self, n: Tensor, target: Tensor, output: Tensor, weight: Tensor) -> None:
        """Add a chunk: fp32 `[tokens, features]` each, and the tokens' weights `[tokens]`.

        The target comes without the part of the output that the norm's weight does not touch.
        """
        n, target, output, weight = n.double(), target.double(), output.double(), weight.double()
        self.n_square += weight @ n.square()
        self.n_y += weight @ (n * target)
        self.n_sum += weight @ n
        self.y_sum += weight @ target
        self.y_square += weight @ target.square()
        self.energy += float((weight @ output.square()).sum())
        self.count += float(weight.sum())

    def add_scaled(self, other: "FeatureMoments", factor: float) -> None:
        """Add another set of sums with its tokens weighted by `factor`."""
        self.n_square.add_(other.n_square, alpha=factor)
        self.n_y.add_(other.n_y, alpha=factor)
        self.n_sum.add_(other.n_sum, alpha=factor)
        self.y_sum.add_(other.y_sum, alpha=factor)
        self.y_square.add_(other.y_square, alpha=factor)
        self.energy += factor * other.energy
        self.count += factor * other.count

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """`sum |w n + b - y|^2` of a weight and a bias fp64 `[features]`."""
        squared = self.n_square * weight.square() - 2 * weight * self.n_y + self.y_square
        if bias is not None:
            squared = squared + 2 * bias * (weight * self.n_sum - self.y_sum)
            squared = squared + self.count * bias.square()
        return max(float(squared.sum()), 0.0)


M = TypeVar("M", LinearMoments, FeatureMoments)


@dataclass(frozen=True)
class Evidence(Generic[M]):
    """Moments of the data of the fit and of held-out data, and the weight they add up to.

    Attributes:
        fit, held_out: all models' in one, or one a model where each has a metric of its own.
            Every model's tokens are weighted by its loss weight over the energy of its
            teacher's output, or over their number.
        total: sum of the loss weights; losses are given as fractions of it.
    """

    fit: Sequence[M]
    held_out: Sequence[M]
    total: float

    def losses(self, weight: Tensor, bias: Tensor | None) -> Losses:
        """Losses of a weight and a bias, in any dtype, as fractions of the teachers' energy."""
        weight = weight.double()
        bias = None if bias is None else bias.double()
        return Losses(
            sum(moments.error(weight, bias) for moments in self.fit) / self.total,
            sum(moments.error(weight, bias) for moments in self.held_out) / self.total,
        )
