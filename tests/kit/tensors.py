"""Random tensors and tokens."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from tests.kit.models import VOCAB_SIZE

CPU = torch.device("cpu")
LENGTH = 12
"""Tokens of a sequence."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal noise; the same seed gives the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens_of(seed: int, sequences: int = 8, length: int = LENGTH) -> Tensor:
    """Random tokens, int64 `[sequences, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (sequences, length), generator=generator)


def counted_of(sequences: int = 8, length: int = LENGTH, *, seed: int = 0) -> Tensor:
    """A mask of some tokens, bool `[sequences, length]`; none of the first sequence."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(sequences, length, generator=generator) < 0.4
    mask[0] = False
    return mask


def kl(teacher: Tensor, merged: Tensor) -> float:
    """KL divergence of logits from a teacher's, in nats per token."""
    p, q = log_softmax(teacher.double(), -1), log_softmax(merged.double(), -1)
    return float(kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
