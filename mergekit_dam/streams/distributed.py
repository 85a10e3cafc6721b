"""Several processes at one merge: torchrun starts them, each runs its share of the sequences.

What a fit knows of its data are sums over the sequences. Every process adds up its own, and
all go on with the total: each holds the same coefficients. In a process that is alone, the
functions here return what they are given, and torch.distributed is not set up.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_dam.errors import DamError

LOG = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""Longest wait for another process. It may be downloading; that one died is told by its sockets."""


@contextmanager
def joined_processes(options: MergeOptions) -> Iterator[MergeOptions]:
    """Meet the other processes of torchrun, if it started any, and part when all are done.

    Tensors on CUDA devices are added up by NCCL where every process of a machine has a device
    of its own, all others by gloo.

    Yields:
        The options for this process: with its own device, and quiet unless it is the first.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield options
        return
    backend, device = "gloo", options.device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.device(device or "cpu").type == "cuda" and torch.cuda.device_count() >= neighbours:
        backend, device = "cpu:gloo,cuda:nccl", f"cuda:{local}"
        torch.cuda.set_device(local)
    if not dist.is_initialized():  # it stays for the next merge: nobody can meet twice
        dist.init_process_group(backend, timeout=_PATIENCE)
    yield options.model_copy(update={"device": device, "quiet": options.quiet or not is_first()})
    from_first(lambda: None)


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if _several() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _several() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def share_of(count: int, turn: int) -> range:
    """Numbers of the sequences that this process runs, of `count` dealt out one by one.

    Args:
        turn: the process that gets the first; another one for every model, so that what
            remains at the end of a round does not fall to the same one each time.
    """
    return range((rank() - turn) % size(), count, size())


def all_sum(x: Tensor) -> Tensor:
    """Sum of all processes' tensors of this shape, the same bytes in each; x may be overwritten."""
    if not _several():
        return x
    by_nccl = x.is_cuda and "nccl" in dist.get_backend_config()
    own = (x if by_nccl else x.cpu()).contiguous()
    with _together():
        dist.all_reduce(own)
    return own.to(x.device)


def all_sums(values: Sequence[float]) -> list[float]:
    """Sums of all processes' numbers, each with its counterparts."""
    if not _several():
        return list(values)
    sums: list[float] = all_sum(torch.tensor(values, dtype=torch.float64)).tolist()
    return sums


def all_rows(x: Tensor) -> Tensor:
    """Rows of all processes, in their order; each may have another number of rows `[n, ...]`."""
    if not _several():
        return x
    counts = torch.zeros(size(), dtype=torch.int64)
    counts[rank()] = len(x)
    ends = all_sum(counts).cumsum(0).tolist()
    rows = x.new_zeros(ends[-1], *x.shape[1:])
    rows[ends[rank()] - len(x) : ends[rank()]] = x
    return all_sum(rows)


def from_first(work: Callable[[], T]) -> T:
    """The result of work that the first process alone does; no tensors on devices."""
    if not _several():
        return work()
    result = [work() if is_first() else None]
    with _together():
        dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]  # type: ignore[return-value]


def in_turn(work: Callable[[], object]) -> None:
    """Work that every process does after those before it, such as filling one cache."""
    for number in range(size()):
        if number == rank():
            work()
        from_first(lambda: None)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _together() -> Iterator[None]:
    """Say what it means when others cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        LOG.debug("collective operation", exc_info=error)
        raise DamError(
            "another process of this merge has stopped; what it printed says why"
        ) from error
