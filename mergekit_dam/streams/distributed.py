"""Several processes in one merge: torchrun starts them, and each runs its share of the sequences.

A fit uses its data only through sums over the sequences. Every process adds up its own sequences,
and all continue with the total, so that all hold the same coefficients. In a single process, the
functions here return their arguments, and torch.distributed is not set up.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_dam.streams import exchange

T = TypeVar("T")


@contextmanager
def joined_processes(options: MergeOptions) -> Iterator[MergeOptions]:
    """Connect to the other processes of torchrun, if it started any, and wait for them at the end.

    NCCL adds up tensors on CUDA devices if every process of a machine has a device of its own;
    gloo adds up all other tensors.

    Yields:
        The options of this process: with its own device, and quiet unless it is the first.
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
    if not dist.is_initialized():  # kept for the next merge: processes can connect only once
        exchange.connect(backend)
    yield options.model_copy(update={"device": device, "quiet": options.quiet or not is_first()})
    from_first(lambda: None)


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if _several() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _several() else 1


def is_first() -> bool:
    """Whether this process is the first one, which writes the output."""
    return rank() == 0


def share_of(count: int, turn: int) -> range:
    """Numbers of the sequences that this process runs, of `count` assigned one by one in turn.

    Args:
        count: Number of sequences of all processes.
        turn: Number of the process that gets the first sequence. It differs from model to model,
            so that the remainder of the last round does not always go to the same process.
    """
    return range((rank() - turn) % size(), count, size())


def all_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all processes, with equal bytes in each of them; `x` may be overwritten."""
    if not _several():
        return x
    by_nccl = x.is_cuda and "nccl" in dist.get_backend_config()
    own = (x if by_nccl else x.cpu()).contiguous()
    return exchange.total(own).to(x.device)


def all_sums(values: Sequence[float]) -> list[float]:
    """Sum of each number over all processes."""
    if not _several():
        return list(values)
    sums: list[float] = all_sum(torch.tensor(values, dtype=torch.float64)).tolist()
    return sums


def all_totals(*totals: Tensor) -> tuple[Tensor, ...]:
    """Sum of each number (a tensor of no dimension) over all processes.

    They are summed on the host: a process without tokens has its zeros nowhere else.
    """
    if not _several():
        return totals
    return all_sum(torch.stack([total.cpu() for total in totals])).unbind()


def all_rows(x: Tensor) -> Tensor:
    """Rows `[n, ...]` of all processes, in the order of the processes; `n` may differ."""
    if not _several():
        return x
    counts = torch.zeros(size(), dtype=torch.int64)
    counts[rank()] = len(x)
    ends = all_sum(counts).cumsum(0).tolist()
    rows = x.new_zeros(ends[-1], *x.shape[1:])
    rows[ends[rank()] - len(x) : ends[rank()]] = x
    return all_sum(rows)


def shared_rows(count: int, made: Callable[[slice], Tensor]) -> Tensor:
    """Rows `[count, ...]` of which every process makes some, and has all.

    Args:
        count: Number of rows.
        made: Makes the rows of a slice.
    """
    own = slice(count * rank() // size(), count * (rank() + 1) // size())
    return all_rows(made(own))


def from_first(work: Callable[[], T]) -> T:
    """The result of work that only the first process does; it must not hold device tensors."""
    if not _several():
        return work()
    result: T = exchange.first_ones(work() if is_first() else None)
    return result


def in_turn(work: Callable[[], object]) -> None:
    """Do work in one process after the other, such as filling one cache."""
    for number in range(size()):
        if number == rank():
            work()
        from_first(lambda: None)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
