"""TODO mergekit_dam/fitting/evidence.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from mergekit_dam.fitting.features import FeatureMoments
from mergekit_dam.fitting.moments import LinearMoments


@dataclass(frozen=True)
class Losses:
    """A loss on the data of the fit and on held-out data."""

    fit: float
    held_out: float


class Judge(Protocol):
    """What judges a fit: sums over tokens, or the tokens."""

    energy: float
    scale: float

    @property
    def count(self) -> float:
        """Sum of the tokens' weights."""

    def add_up(self) -> None:
        """Take in what other processes have."""

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Of a merged weight and bias, in any dtype."""


M = TypeVar("M", LinearMoments, FeatureMoments)


@dataclass(frozen=True)
class Evidence(Generic[M]):
    """Data of the fit and held-out data of one tensor, and the weight they add up to.

    Attributes:
        fit: all models' sums in one, or one a model where each has a metric of its own.
        held_out: one a model. Every model's tokens are weighted by its loss weight over the
            energy of its teacher's output, or over their number.
        total: sum of the loss weights; losses are given as fractions of it.
    """

    fit: Sequence[M]
    held_out: Sequence[Judge]
    total: float

    def fit_loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Loss on the data of the fit, as a fraction of the teachers' energy."""
        return sum(sums.error(weight, bias) for sums in self.fit) / self.total

    def held_out_loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Loss on held-out data, as a fraction of the teachers' energy."""
        return sum(sums.error(weight, bias) for sums in self.held_out) / self.total

    def losses(self, weight: Tensor, bias: Tensor | None) -> Losses:
        """Both losses of a weight and a bias, in any dtype."""
        return Losses(self.fit_loss(weight, bias), self.held_out_loss(weight, bias))
