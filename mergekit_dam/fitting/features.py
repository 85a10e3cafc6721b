"""Sufficient statistics of the fit of a norm, per feature."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dam.fitting.moments import nothing
from mergekit_dam.streams.distributed import all_sum, all_totals


@dataclass
class FeatureMoments:
    """Sums over weighted tokens, per feature, for the fit of w in `y = w * n + o`.

    Attributes:
        n_square: `sum n^2`, `[features]`, where n is the normalised input.
        n_y: `sum n * (y - o)`, where o is the part of the output that does not depend on w.
        n_sum: `sum n`.
        y_sum: `sum (y - o)`.
        y_square: `sum (y - o)^2`, per feature.
        energy: `sum |teacher's own output|^2`.
        count: Sum of the tokens' weights.
        scale: Factor of all these sums.
    """

    n_square: Tensor
    n_y: Tensor
    n_sum: Tensor
    y_sum: Tensor
    y_square: Tensor
    energy: Tensor = field(default_factory=nothing)
    count: Tensor = field(default_factory=nothing)
    scale: float = 1.0

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> "FeatureMoments":
        """Empty sums."""
        n_square, n_y, n_sum, y_sum, y_square = torch.zeros(
            5, features, dtype=torch.float64, device=device
        )
        return cls(n_square, n_y, n_sum, y_sum, y_square)

    def add(self, n: Tensor, target: Tensor, output: Tensor, weight: Tensor) -> None:
        """Add a chunk: three tensors fp32 `[tokens, features]`, and the tokens' weights `[tokens]`.

        `target` is without the part of the output that does not depend on the norm's weight.
        """
        n, target, output, weight = n.double(), target.double(), output.double(), weight.double()
        self.n_square += weight @ n.square()
        self.n_y += weight @ (n * target)
        self.n_sum += weight @ n
        self.y_sum += weight @ target
        self.y_square += weight @ target.square()
        self.energy = self.energy + (weight @ output.square()).sum()
        self.count = self.count + weight.sum()

    def add_up(self) -> None:
        """Add the sums of the other processes."""
        sums = (self.n_square, self.n_y, self.n_sum, self.y_sum, self.y_square)
        self.n_square, self.n_y, self.n_sum, self.y_sum, self.y_square = map(all_sum, sums)
        self.energy, self.count = all_totals(self.energy, self.count)

    def scaled(self, factor: float) -> "FeatureMoments":
        """A copy with its tokens weighted by `factor`."""
        copy = FeatureMoments.zeros(len(self.n_square), self.n_square.device)
        copy.add_scaled(self, factor)
        return copy

    def add_scaled(self, other: "FeatureMoments", factor: float) -> None:
        """Add another set of sums with its tokens weighted by `factor`."""
        self.n_square.add_(other.n_square, alpha=factor)
        self.n_y.add_(other.n_y, alpha=factor)
        self.n_sum.add_(other.n_sum, alpha=factor)
        self.y_sum.add_(other.y_sum, alpha=factor)
        self.y_square.add_(other.y_square, alpha=factor)
        self.energy = self.energy + factor * other.energy
        self.count = self.count + factor * other.count

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """`scale * sum |w n + b - y|^2` for a weight and a bias `[features]`."""
        weight, bias = weight.double(), None if bias is None else bias.double()
        squared = self.n_square * weight.square() - 2 * weight * self.n_y + self.y_square
        if bias is not None:
            squared = squared + 2 * bias * (weight * self.n_sum - self.y_sum)
            squared = squared + self.count * bias.square()
        # Rounding can make a small difference of large sums negative.
        return self.scale * max(float(squared.sum()), 0.0)
