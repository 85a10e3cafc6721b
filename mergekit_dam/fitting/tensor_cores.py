"""Products of fp32 matrices on a GPU's tensor cores, which round their factors to TF32.

TF32 has 10 bits of mantissa, and sums are fp32. Where the models' blocks run in half precision,
that is enough for sums over tokens, which are rounded alike wherever a token enters, and for what
steers a solution. Differences of large sums need fp32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def tensor_cores(allowed: bool) -> Iterator[None]:
    """Allow or forbid them while the body runs; without a GPU this has no effect."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def exact() -> AbstractContextManager[None]:
    """Forbid them while the body runs."""
    return tensor_cores(False)
