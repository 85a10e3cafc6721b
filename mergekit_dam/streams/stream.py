"""The two streams of hidden states that pass from block to block, for each calibration set."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergekit_dam.streams.share import SPLITS, Share, Split
from mergekit_dam.streams.storage import Sequences, Storage

CHUNK_TOKENS = 2048
"""Number of tokens that run through a part at once."""


def chunk_sequences(length: int) -> int:
    """How many sequences of a length run through a part at a time: at least one."""
    return max(1, CHUNK_TOKENS // length)


def chunks(first: int, last: int, length: int) -> Iterator[slice]:
    """Slices of the sequences `[first, last)`; each slice runs through a part at once.

    Args:
        length: Tokens per sequence.
    """
    size = chunk_sequences(length)
    return (slice(begin, min(begin + size, last)) for begin in range(first, last, size))


def concatenated(chunks: Sequence[Tensor], *, none: Tensor) -> Tensor:
    """The concatenation of chunks; `none`, an empty tensor, if this process has no chunks."""
    return torch.cat(list(chunks)) if chunks else none


@dataclass
class Stream:
    """One model's calibration data on its way through that model and through the merged model.

    In a search, the teacher is ahead: it runs only once, and has already left its last block.

    Attributes:
        source: Index of the model (the teacher) among the sources.
        teacher: Input of the teacher's next part: token ids int64 `[sequences, length]`, later
            hidden states fp32 `[sequences, length, hidden]`.
        merged: The same for the merged model.
        share: Global numbers of these sequences, and which of them are held out.
        storage: Storage of the next part's output.
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
        """This process's share of the sequences, before the first part of the model.

        Args:
            tokens: Token ids of all processes, int64 `[sequences, length]`.
            turn: Number of the process that gets the first sequence.
        """
        share = Share.of_process(len(tokens), held_out, turn)
        own = tokens[share.numbers.start :: share.numbers.step]
        return cls(source, own, own, share, storage or Storage())

    def of(self, split: Split) -> "Stream":
        """The sequences of one split."""
        first, end = self.share.rows(split)
        teacher, merged = (x.narrow(0, first, end - first) for x in (self.teacher, self.merged))
        return replace(self, teacher=teacher, merged=merged, share=self.share.of(split))

    def first(self, count: int) -> "Stream":
        """The first sequences of all processes, `count` of them; none of them is held out."""
        share = self.share.first(count)
        rows = len(share.numbers)
        teacher, merged = (x.narrow(0, 0, rows) for x in (self.teacher, self.merged))
        return replace(self, teacher=teacher, merged=merged, share=share)

    def keep(self, leaving: Iterable[Tensor]) -> Sequences:
        """Store the output of a part, chunk by chunk."""
        if not self.share.numbers:
            return self.teacher
        return self.storage.keep(leaving, self.teacher.shape[0])

    def kept_again(self, x: Tensor) -> Sequences:
        """Hidden states of these sequences that an earlier run has kept in its journal."""
        return self.storage.kept_again(x, self.chunks())

    def chunks(self, split: Split | None = None) -> Iterator[slice]:
        """Slices of the sequences, in order; of one split, or of all sequences."""
        for own in SPLITS if split is None else (split,):
            yield from chunks(*self.share.rows(own), self.teacher.shape[1])
