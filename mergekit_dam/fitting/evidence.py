"""The data of one tensor's fit, and the data that judges it."""

from collections.abc import Iterator, Sequence
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
J = TypeVar("J")

NOTHING = 1e-30
"""Energy, or number of tokens, from which on a stream has a size."""


def scales(weights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """By what each stream's errors are multiplied: its loss weight, divided by its size.

    A stream without a size (its teacher puts out zeros, or it has no tokens) is taken to have the
    mean size of the others. Else any error of its would count for infinitely more than theirs.

    Args:
        weights: loss weights.
        sizes: energies of what the teachers put out, or numbers of tokens.
    """
    known = [size for size in sizes if size > NOTHING]
    usual = sum(known) / len(known) if known else 1.0
    own = (size if size > NOTHING else usual for size in sizes)
    return [weight / size for weight, size in zip(weights, own, strict=True)]


@dataclass(frozen=True)
class _Sized(Generic[J]):
    """A stream's data with its loss weight and size; without the data once that is added up."""

    judge: J | None
    weight: float
    size: float


class Pool(Generic[M]):
    """The evidence of one tensor, collected from one stream after the other.

    Args:
        measured_alike: Whether the errors of all streams are measured in one metric. If so, their
            sums are added up; else each stream keeps its own sums.
    """

    def __init__(self, *, measured_alike: bool) -> None:
        self._add_up = measured_alike
        self._sums: list[M] = []
        self._fit: list[_Sized[M]] = []
        self._held_out: list[_Sized[Judge]] = []

    def add(self, sums: M, weight: float, size: float) -> None:
        """Add a stream's sums over the data of the fit; see `scales` for its weight and size."""
        known = self._add_up and size > NOTHING
        if known:
            self._take(sums, weight / size)
        self._fit.append(_Sized(None if known else sums, weight, size))

    def add_held_out(self, judge: Judge, weight: float, size: float) -> None:
        """Add a stream's held-out data."""
        self._held_out.append(_Sized(judge, weight, size))

    def evidence(self) -> "Evidence[M]":
        """All evidence; if nothing is held out, the data of the fit judges."""
        for sums, scale in _scaled(self._fit):
            self._take(sums, scale)
        held_out: list[Judge] = []
        for judge, scale in _scaled(self._held_out):
            judge.scale = scale
            held_out.append(judge)
        total = sum(own.weight for own in self._fit)
        return Evidence(self._sums, held_out or self._sums, total)

    def _take(self, sums: M, scale: float) -> None:
        if not self._add_up:
            sums.scale = scale
            self._sums.append(sums)
        elif self._sums:
            self._sums[0].add_scaled(sums, scale)
        else:
            self._sums.append(sums.scaled(scale))


def _scaled(streams: Sequence[_Sized[J]]) -> Iterator[tuple[J, float]]:
    """The data that is not added up yet, each with its scale."""
    found = scales([own.weight for own in streams], [own.size for own in streams])
    for own, scale in zip(streams, found, strict=True):
        if own.judge is not None:
            yield own.judge, scale


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
