"""The two streams of hidden states that flow from block to block, per calibration set."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergekit_dam.streams.share import SPLITS, Share, Split
from mergekit_dam.streams.storage import Sequences, Storage

CHUNK_TOKENS = 2048
"""Tokens that run through a part at a time."""


def chunk_sequences(length: int) -> int:
    """How many sequences of a length run through a part at a time: at least one."""
    return max(1, CHUNK_TOKENS // length)


def chunks(first: int, last: int, length: int) -> Iterator[slice]:
    """Slices of the sequences from first to before last that run through a part at a time.

    Args:
        length: of a sequence, in tokens.
    """
    size = chunk_sequences(length)
    return (slice(begin, min(begin + size, last)) for begin in range(first, last, size))


def concatenated(chunks: Sequence[Tensor], *, none: Tensor) -> Tensor:
    """Chunks in one; `none`, which has no sequences, where this process has none to run."""
    return torch.cat(list(chunks)) if chunks else none


@dataclass
class Stream:
    """One model's calibration data on its way through that model and through the merged one.

    In a search the teacher has gone ahead: it has left its last block, as it runs only once.

    Attributes:
        source: index of the model (the teacher) among the sources.
        teacher: what enters the next part of the teacher: token ids int64
            `[sequences, length]`, later hidden states fp32 `[sequences, length, hidden]`.
        merged: the same for the merged model.
        share: which sequences these are, and which of them are held out.
        storage: keeps what leaves the next part.
    """

    source: int
    teacher: Sequences
    merged: Sequences
    share: Share
    storage: Storage = field(default_factory=Storage)

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
            tokens: int64 `[sequences, length]`, of all processes.
            turn: the process that gets the first sequence.
        """
        share = Share.of_process(len(tokens), held_out, turn)
        own = tokens[share.numbers.start :: share.numbers.step]
        return cls(source, own, own, share, storage or Storage())

    def of(self, split: Split) -> "Stream":
        """The sequences of one split."""
        first, end = self.share.rows(split)
        teacher, merged = (x.narrow(0, first, end - first) for x in (self.teacher, self.merged))
        return replace(self, teacher=teacher, merged=merged, share=self.share.of(split))

    def keep(self, leaving: Iterable[Tensor]) -> Sequences:
        """Put what leaves a part, chunk by chunk, where the stream is kept."""
        if not self.share.numbers:
            return self.teacher
        return self.storage.keep(leaving, self.teacher.shape[0])

    def chunks(self, split: Split | None = None) -> Iterator[slice]:
        """Slices of sequences, in order; of all of them or of one split."""
        for own in SPLITS if split is None else (split,):
            yield from chunks(*self.share.rows(own), self.teacher.shape[1])
