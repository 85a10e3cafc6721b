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
        count, length = self.teacher.shape[:2]
        border = count - self.held_out
        size = max(1, CHUNK_TOKENS // length)
        parts = {"fit": (0, border), "held_out": (border, count)}
        for begin, end in parts.values() if split is None else (parts[split],):
            for first in range(begin, end, size):
                yield slice(first, min(first + size, end))
