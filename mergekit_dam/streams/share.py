"""The split of a model's sequences into fit and held-out data, and this process's share of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mergekit_dam.streams.distributed import share_of

Split = Literal["fit", "held_out"]

SPLITS: tuple[Split, Split] = ("fit", "held_out")
"""The splits, in the order of their sequences."""


@dataclass(frozen=True)
class Share:
    """This process's share of one model's sequences, of which the last are held out.

    Attributes:
        numbers: Global numbers of this process's sequences; the range's stop is their global
            count, its step the number of processes.
        held_out: Number of held-out sequences of all processes: the last ones. They judge the fit
            and take no part in it.
    """

    numbers: range
    held_out: int = 0

    @classmethod
    def of_all(cls, count: int, held_out: int = 0) -> "Share":
        """All sequences, in one process."""
        return cls(range(count), held_out)

    @classmethod
    def of_process(cls, count: int, held_out: int, turn: int) -> "Share":
        """The sequences that this process runs.

        Args:
            turn: Number of the process that gets the first sequence.
        """
        return cls(share_of(count, turn), held_out)

    def count(self, split: Split) -> int:
        """Number of sequences of a split in all processes."""
        first, end = self._bounds(split)
        return end - first

    def rows(self, split: Split) -> tuple[int, int]:
        """Row of this process's first sequence in a split, and the row after its last one."""
        own = self.numbers
        edge = len(range(own.start, own.stop - self.held_out, own.step))
        return (0, edge) if split == "fit" else (edge, len(own))

    def row_of(self, number: int) -> int | None:
        """This process's row of the sequence with a global number; None if another one has it."""
        return self.numbers.index(number) if number in self.numbers else None

    def of(self, split: Split) -> "Share":
        """The sequences of one split, numbered from 0."""
        first, end = self._bounds(split)
        start = (self.numbers.start - first) % self.numbers.step
        held_out = 0 if split == "fit" else self.held_out
        return Share(range(start, end - first, self.numbers.step), held_out)

    def first(self, count: int) -> "Share":
        """The first `count` sequences of all processes, none of them held out."""
        return Share(range(self.numbers.start, count, self.numbers.step))

    def _bounds(self, split: Split) -> tuple[int, int]:
        """Global number of the first sequence of a split, and the number after its last one."""
        edge = self.numbers.stop - self.held_out
        return (0, edge) if split == "fit" else (edge, self.numbers.stop)


def judging_split(shares: Iterable[Share]) -> Split:
    """The split that judges a fit: "held_out" if every model has such sequences, else "fit"."""
    return "held_out" if all(share.held_out for share in shares) else "fit"
