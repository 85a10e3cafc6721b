"""The held-out tokens that judge the fits of single tensors.

Candidates for a tensor are compared on the same tokens, so that few of them tell which is better,
while every comparison multiplies all of them by a whole weight. The model as a whole is judged on
all of its held-out text.
"""

import torch
from torch import Tensor

TOKENS = 512
"""Held-out tokens of a model that judge a tensor, about: all of them, or every so manieth."""


def stride(tokens: int) -> int:
    """Every how manieth held-out token judges.

    Args:
        tokens: held-out tokens of one model that count, in all processes.
    """
    return max(1, tokens // TOKENS)


def judging_rows(numbers: range, length: int, every: int) -> Tensor:
    """Which tokens of some sequences judge: their rows, int64, among `sequences * length`.

    The first one moves on by a token per sequence, so that all positions have their turn.

    Args:
        numbers: numbers of the sequences among those of all processes.
        length: tokens per sequence.
        every: the stride.
    """
    own = torch.arange(numbers.start, numbers.stop, numbers.step)
    places = own[:, None] + torch.arange(length)
    return (places % every == 0).reshape(-1).nonzero()[:, 0]
