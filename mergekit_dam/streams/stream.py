"""The two streams of hidden states that flow from block to block, per calibration set."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dam.streams.distributed import share_of
from mergekit_dam.streams.share import Split, border, own_border
from mergekit_dam.streams.storage import Sequences, Storage

CHUNK_TOKENS = 2048
"""Tokens that run through a part at a time."""


def chunks(first: int, last: int, length: int) -> Iterator[slice]:
    """Slices of the sequences from first to before last that run through a part at a time.

    Args:
        length: of a sequence, in tokens.
    """
    size = max(1, CHUNK_TOKENS // length)
    return (slice(begin, min(begin + size, last)) for begin in range(first, last, size))


def concatenated(chunks: Sequence[Tensor], *, none: Tensor) -> Tensor:
    """Chunks in one; `none`, which has no sequences, where this process has none to run."""
    return torch.cat(list(chunks)) if chunks else none


@dataclass
class Stream:
    """One model's calibration data on its way through that model and through the merged one.

    Attributes:
        source: index of the model (the teacher) among the sources.
        teacher: what enters the next part of the teacher: token ids int64
            `[sequences, length]`, later hidden states fp32 `[sequences, length, hidden]`.
        merged: the same for the merged model.
        held_out: the last so many sequences of all judge the fit and take no part in it.
        storage: keeps what leaves the next part.
        numbers: which of all sequences these are; up to their number. None: they are all.
    """

    source: int
    teacher: Sequences
    merged: Sequences
    held_out: int
    storage: Storage = field(default_factory=Storage)
    numbers: range | None = None

    @classmethod
    def of_tokens(
        cls,
        source: int,
        tokens: Tensor,
        held_out: int,
        storage: Storage | None = None,
        *,
        turn: int = 0,
    ) -> "Stream":
        """This process's share of the sequences, at the entrance of the model.

        Args:
            turn: the process that gets the first sequence.
        """
        numbers = share_of(len(tokens), turn)
        own = tokens[numbers.start :: numbers.step]
        return cls(source, own, own, held_out, storage or Storage(), numbers)

    @property
    def own(self) -> range:
        """Numbers of the sequences, among all."""
        return range(self.teacher.shape[0]) if self.numbers is None else self.numbers

    def count(self, split: Split) -> int:
        """Sequences of a split, those of all processes."""
        first, last = border(self.own.stop, self.held_out, split)
        return last - first

    def keep(self, leaving: Iterable[Tensor]) -> Sequences:
        """Put what leaves a part, chunk by chunk, where the stream is kept."""
        if not self.own:
            return self.teacher
        return self.storage.keep(leaving, self.teacher.shape[0])

    def chunks(self, split: Split | None = None) -> Iterator[slice]:
        """Slices of sequences, in order; of all of them or of one split."""
        splits: tuple[Split, ...] = ("fit", "held_out") if split is None else (split,)
        for first, last in map(self.border, splits):
            yield from chunks(first, last, self.teacher.shape[1])

    def border(self, split: Split) -> tuple[int, int]:
        """First sequence of a split, and the one after its last."""
        return own_border(self.own, self.held_out, split)
