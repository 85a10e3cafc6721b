"""Which calibration tokens count in losses, and how much.

The weights of the tokens that count are equal, and their mean over all tokens of a split is 1. So
the mean of a weighted loss over all sequences and tokens is the mean over the tokens that count.
"""

import torch
from torch import Tensor


def token_weights(counted: Tensor, held_out: int) -> Tensor:
    """Weight of every token, fp32 `[sequences, length]`.

    Args:
        counted: Which tokens count, bool `[sequences, length]`; some of each split.
        held_out: Number of held-out sequences: the last ones.
    """
    sizes = [len(counted) - held_out, held_out]
    splits = torch.split(counted.float(), sizes)
    return torch.cat([own / own.mean() for own in splits if len(own)])


def counted_tokens(weights: Tensor | None, row: int) -> tuple[Tensor | slice, float]:
    """The tokens of a sequence that count: their places, and the weight of their mean loss.

    Args:
        weights: Weights of the tokens, `[sequences, length]`; None if all count alike.
        row: Row of the sequence.

    Returns:
        (int64 `[tokens]` or a slice, weight); the weight is 0 if none counts.
    """
    if weights is None:
        return slice(None), 1.0
    return weights[row].nonzero()[:, 0], float(weights[row].mean())
