"""The number of threads that a merge computes with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NARROW = 512
"""Features of the residual stream below which one thread computes: products are so small that more
threads win a tenth on an idle machine, and lose a multiple where others compute, too."""


def use_own_share(width: int = NARROW) -> None:
    """Use as many threads as this process may use processors, unless the user has set a number.

    torch starts one for every processor of the machine. A container with a quota of two on a
    machine of 64 would have 64 that wait for each other.

    Args:
        width: features of the models' residual stream, where they are known.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    import joblib  # takes half a second

    own = max(1, min(torch.get_num_threads(), joblib.cpu_count()))
    torch.set_num_threads(1 if width < NARROW else own)


@contextmanager
def own_share() -> Iterator[None]:
    """Use as many threads as `use_own_share` says, and as many as before at the end."""
    before = torch.get_num_threads()
    use_own_share()
    try:
        yield
    finally:
        torch.set_num_threads(before)
