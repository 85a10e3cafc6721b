"""The two streams of hidden states that flow from block to block, per calibration set."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

CHUNK_TOKENS = 2048
"""Tokens that run through a part at a time."""

Split = Literal["fit", "held_out"]


@dataclass
class Stream:
    """One model's calibration data on its way through that model and through the merged one.

    Attributes:
        source: index of the model (the teacher) among the sources.
        teacher: what enters the next part of the teacher: token ids int64
            `[sequences, length]`, later hidden states fp32 `[sequences, length, hidden]`.
        merged: the same for the merged model.
        held_out: the last so many sequences judge the fit and take no part in it.
    """

    source: int
    teacher: Tensor
    merged: Tensor
    held_out: int

    @classmethod
    def of_tokens(cls, source: int, tokens: Tensor, held_out: int) -> "Stream":
        """A stream at the entrance of the model."""
        return cls(source, tokens, tokens, held_out)

    def chunks(self, split: Split | None = None) -> Iterator[slice]:
        """Slices of sequences, in order; of all of them or of one split."""
        size = max(1, CHUNK_TOKENS // self.teacher.shape[1])
        splits: tuple[Split, ...] = ("fit", "held_out") if split is None else (split,)
        for begin, end in map(self.border, splits):
            for first in range(begin, end, size):
                yield slice(first, min(first + size, end))

    def border(self, split: Split) -> tuple[int, int]:
        """First sequence of a split, and the one after its last."""
        count = self.teacher.shape[0]
        edge = count - self.held_out
        return (0, edge) if split == "fit" else (edge, count)
