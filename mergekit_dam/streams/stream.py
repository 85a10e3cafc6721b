"""The two streams of hidden states that pass from block to block, for each calibration set."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergekit_dam.streams.counting import counted_tokens, token_weights
from mergekit_dam.streams.distributed import all_sums
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
        weights: Weight of every token in losses (see `counting`), fp32 `[sequences, length]`;
            None if all count alike.
    """

    source: int
    teacher: Sequences
    merged: Sequences
    share: Share
    storage: Storage = field(default_factory=Storage)
    weights: Tensor | None = None

    @classmethod
    def of_tokens(
        cls,
        source: int,
        tokens: Tensor,
        held_out: int,
        storage: Storage | None = None,
        *,
        turn: int = 0,
        counted: Tensor | None = None,
    ) -> "Stream":
        """This process's share of the sequences, before the first part of the model.

        Args:
            tokens: Token ids of all processes, int64 `[sequences, length]`.
            turn: Number of the process that gets the first sequence.
            counted: Which tokens count in losses, bool `[sequences, length]`; None if all do.
        """
        share = Share.of_process(len(tokens), held_out, turn)
        mine = slice(share.numbers.start, None, share.numbers.step)
        own = tokens[mine]
        weights = None if counted is None else token_weights(counted, held_out)[mine]
        return cls(source, own, own, share, storage or Storage(), weights)

    def of(self, split: Split) -> "Stream":
        """The sequences of one split."""
        first, end = self.share.rows(split)
        return self._rows(first, end, self.share.of(split))

    def first(self, count: int) -> "Stream":
        """The first sequences of all processes, `count` of them; none of them is held out."""
        share = self.share.first(count)
        return self._rows(0, len(share.numbers), share)

    def _rows(self, first: int, end: int, share: Share) -> "Stream":
        teacher, merged = (x.narrow(0, first, end - first) for x in (self.teacher, self.merged))
        weights = None if self.weights is None else self.weights[first:end]
        return replace(self, teacher=teacher, merged=merged, share=share, weights=weights)

    def counted_tokens(self, row: int) -> tuple[Tensor | slice, float]:
        """The tokens of a sequence that count: their places, and the weight of their mean loss."""
        return counted_tokens(self.weights, row)

    def number_counted(self, split: Split) -> int:
        """Number of tokens of a split that count, in all processes."""
        if self.weights is None:
            return self.share.count(split) * self.teacher.shape[1]
        own = self.weights[slice(*self.share.rows(split))].count_nonzero()
        return int(all_sums([float(own)])[0])

    def judging(self, chunk: slice) -> Tensor | None:
        """Which tokens of a chunk judge, bool `[tokens]`; None if all do, or if it is of the fit.

        A fit goes by all of its tokens.
        """
        if self.weights is None or chunk.start < self.share.rows("held_out")[0]:
            return None
        return (self.weights[chunk] > 0).reshape(-1)

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
