"""Means of losses, differences and recovery, with standard errors.

A sequence is the unit: its tokens depend on each other, and all models read the same sequences. So
differences are taken sequence by sequence, and what all models find hard cancels out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """A number with its standard error, which is None where one sequence alone was measured."""

    value: float
    error: float | None = None

    @property
    def perplexity(self) -> "Measured":
        """The perplexity of a loss in nats per token."""
        try:
            value = math.exp(self.value)
        except OverflowError:
            value = math.inf
        return Measured(value, None if self.error is None else value * self.error)


def mean(values: Tensor) -> Measured:
    """The mean of one number per sequence.

    Args:
        values: fp64 `[sequences]`.
    """
    count = len(values)
    error = values.std().item() / math.sqrt(count) if count > 1 else None
    return Measured(values.mean().item(), error)


def recovery(merged: Tensor, average: Tensor, own: Tensor) -> Measured | None:
    """The share of a specialist's advantage over the average that a merge wins back.

    It is `(average - merged) / (average - own)` of the mean losses on the specialist's text: 0 is
    the average, and 1 as good as the specialist. The standard error is that of a ratio of means,
    to first order (Cochran, Sampling Techniques, 1977, section 6.4).

    Args:
        merged, average, own: Losses of the same sequences, fp64 `[sequences]`.

    Returns:
        None if the specialist is no better than the average.
    """
    won, advantage = average - merged, average - own
    whole = advantage.mean().item()
    if whole <= 0:
        return None
    share = won.mean().item() / whole
    return Measured(share, mean((won - share * advantage) / whole).error)


def average_of(values: Iterable[Measured | None]) -> Measured | None:
    """The mean over texts, each counted the same; None if one of them has no number."""
    found = list(values)
    known = [each for each in found if each is not None]
    if not known or len(known) < len(found):
        return None
    errors = [each.error for each in known]
    value = math.fsum(each.value for each in known) / len(known)
    if any(error is None for error in errors):
        return Measured(value)
    return Measured(value, math.hypot(*(error or 0.0 for error in errors)) / len(known))
