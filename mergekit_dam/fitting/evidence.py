"""The data of one tensor's fit, and the data that judges it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from mergekit_dam.fitting.features import FeatureMoments
from mergekit_dam.fitting.moments import LinearMoments


@dataclass(frozen=True)
class Losses:
    """A loss on the data of the fit, where that is known, and on the held-out data."""

    fit: float | None
    held_out: float


class Judge(Protocol):
    """Data that judges a fit: sums over tokens, or the tokens themselves."""

    energy: Tensor
    scale: float

    @property
    def count(self) -> Tensor:
        """Sum of the tokens' weights."""

    def add_up(self) -> None:
        """Add the sums of the other processes."""

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """The error of a merged weight and bias, in any dtype."""


M = TypeVar("M", LinearMoments, FeatureMoments)


class Pool(Generic[M]):
    """The evidence of one tensor, collected from one stream after the other.

    Args:
        measured_alike: Whether the errors of all streams are measured in one metric. If so, their
            sums are added up; else each stream keeps its own sums.
    """

    def __init__(self, *, measured_alike: bool) -> None:
        self._add_up = measured_alike
        self._fit: list[M] = []
        self._held_out: list[Judge] = []

    def add(self, sums: M, scale: float) -> None:
        """Add a stream's sums over the data of the fit, weighted by `scale`."""
        if not self._add_up:
            sums.scale = scale
            self._fit.append(sums)
        elif self._fit:
            self._fit[0].add_scaled(sums, scale)
        else:
            self._fit.append(sums.scaled(scale))

    def add_held_out(self, judge: Judge, scale: float) -> None:
        """Add a stream's held-out data, weighted by `scale`."""
        judge.scale = scale
        self._held_out.append(judge)

    def evidence(self, total: float) -> "Evidence[M]":
        """All evidence; if nothing is held out, the data of the fit judges.

        Args:
            total: Sum of the streams' loss weights.
        """
        return Evidence(self._fit, self._held_out or self._fit, total)


@dataclass(frozen=True)
class Evidence(Generic[M]):
    """Data of the fit and held-out data of one tensor, and the sum of their weights.

    Attributes:
        fit: Sums over the data of the fit: of all models together, or one entry per model if each
            model has a metric of its own.
        held_out: Held-out data, one entry per model. The tokens of a model are weighted by its
            loss weight, divided by the energy of its teacher's output or by their number.
        total: Sum of the loss weights; losses are fractions of it.
    """

    fit: Sequence[M]
    held_out: Sequence[Judge]
    total: float

    def fit_loss(self, weight: Tensor, bias: Tensor | None) -> float | None:
        """Loss on the data of the fit, as a fraction of the teachers' energy, where it is known."""
        if not self.knows_fit_loss:
            return None
        return sum(sums.error(weight, bias) for sums in self.fit) / self.total

    @property
    def knows_fit_loss(self) -> bool:
        """Whether the sums over the data of the fit give its loss."""
        return all(not isinstance(sums, LinearMoments) or sums.squares for sums in self.fit)

    def held_out_loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Loss on the held-out data, as a fraction of the teachers' energy."""
        return sum(sums.error(weight, bias) for sums in self.held_out) / self.total

    def losses(self, weight: Tensor, bias: Tensor | None) -> Losses:
        """Both losses of a merged weight and bias, in any dtype."""
        return Losses(self.fit_loss(weight, bias), self.held_out_loss(weight, bias))
