"""Random tensors and tokens."""

import torch
from torch import Tensor

from tests.kit.models import VOCAB_SIZE

CPU = torch.device("cpu")
LENGTH = 12


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens_of(seed: int, sequences: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (sequences, LENGTH), generator=generator)
