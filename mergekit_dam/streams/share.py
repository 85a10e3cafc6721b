"""Which sequences are whose: of the fit or held out, of this process or another."""

from collections.abc import Sequence
from typing import Literal, Protocol

Split = Literal["fit", "held_out"]


class Divided(Protocol):
    """Sequences of which the last so many are held out, in one process or another."""

    @property
    def held_out(self) -> int: ...


def judging_split(data: Sequence[Divided]) -> Split:
    """Held-out data where every model has some, else that of the fit."""
    return "held_out" if all(own.held_out for own in data) else "fit"


def border(count: int, held_out: int, split: Split) -> tuple[int, int]:
    """First sequence of a split, and the one after its last; the last sequences are held out."""
    edge = count - held_out
    return (0, edge) if split == "fit" else (edge, count)


def own_border(numbers: range, held_out: int, split: Split) -> tuple[int, int]:
    """The same among the sequences of this process, which have these numbers among all."""
    edge = len(range(numbers.start, numbers.stop - held_out, numbers.step))
    return (0, edge) if split == "fit" else (edge, len(numbers))


def numbers_within(numbers: range, first: int, last: int) -> range:
    """Sequences of this process that stand between two of all, counted from the first of them."""
    return range((numbers.start - first) % numbers.step, last - first, numbers.step)
