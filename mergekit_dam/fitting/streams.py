"""The two streams of hidden states that flow from block to block, per calibration set."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mergekit_dam.fitting.storage import Sequences, Storage

CHUNK_TOKENS = 2048
"""Tokens that run through a part at a time."""

Split = Literal["fit", "held_out"]


def chunks(first: int, last: int, length: int) -> Iterator[slice]:
    """Slices of the sequences from first to before last that run through a part at a time.

    Args:
        length: of a sequence, in tokens.
    """
    size = max(1, CHUNK_TOKENS // length)
    return (slice(begin, min(begin + size, last)) for begin in range(first, last, size))


def border(count: int, held_out: int, split: Split) -> tuple[int, int]:
    """First sequence of a split, and the one after its last; the last sequences are held out."""
    edge = count - held_out
    return (0, edge) if split == "fit" else (edge, count)


@dataclass
class Stream:
    """One model's calibration data on its way through that model and through the merged one.

    Attributes:
        source: index of the model (the teacher) among the sources.
        teacher: what enters the next part of the teacher: token ids int64
            `[sequences, length]`, later hidden states fp32 `[sequences, length, hidden]`.
        merged: the same for the merged model.
        held_out: the last so many sequences judge the fit and take no part in it.
        storage: keeps what leaves the next part.
    """

    source: int
    teacher: Sequences
    merged: Sequences
    held_out: int
    storage: Storage = field(default_factory=Storage)

    @classmethod
    def of_tokens(
        cls, source: int, tokens: Tensor, held_out: int, storage: Storage | None = None
    ) -> "Stream":
        """A stream at the entrance of the model."""
        return cls(source, tokens, tokens, held_out, storage or Storage())

    def keep(self, leaving: Iterable[Tensor]) -> Sequences:
        """Put what leaves a part, chunk by chunk, where the stream is kept."""
        return self.storage.keep(leaving, self.teacher.shape[0])

    def chunks(self, split: Split | None = None) -> Iterator[slice]:
        """Slices of sequences, in order; of all of them or of one split."""
        splits: tuple[Split, ...] = ("fit", "held_out") if split is None else (split,)
        for first, last in map(self.border, splits):
            yield from chunks(first, last, self.teacher.shape[1])

    def border(self, split: Split) -> tuple[int, int]:
        """First sequence of a split, and the one after its last."""
        return border(self.teacher.shape[0], self.held_out, split)
