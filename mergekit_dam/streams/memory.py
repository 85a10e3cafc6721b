"""The memory that a merge may use: that of the host, and that of the GPU up to a limit."""

import ctypes
import sys
from functools import cache
from typing import Any

import psutil
import torch


def is_gpu(device: torch.device) -> bool:
    """Whether a device has memory of its own; others compute in the host's."""
    return device.type not in ("cpu", "mps")


def limit_gpu(device: torch.device, limit: int | None) -> None:
    """Limit the bytes of a GPU that this process may use; None sets no limit.

    torch enforces the limit: beyond it an allocation fails, even if memory is free.
    """
    if not is_gpu(device):
        return
    whole = _own(device).get_device_properties(device).total_memory
    fraction = 1.0 if limit is None else min(1.0, limit / whole)
    _own(device).set_per_process_memory_fraction(fraction, _number(device))


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory that this process may use."""
    if not is_gpu(device):
        return psutil.virtual_memory().total
    whole = _own(device).get_device_properties(device).total_memory
    return int(whole * _own(device).get_per_process_memory_fraction(_number(device)))


def _own(device: torch.device) -> Any:
    """Torch's functions for a kind of GPU."""
    return torch.get_device_module(device)


def _number(device: torch.device) -> int:
    """The number of a GPU; without one, it is the GPU that torch uses at the moment."""
    return int(_own(device).current_device() if device.index is None else device.index)


def free_memory_of(device: torch.device) -> int:
    """Bytes of that memory that are free at the moment."""
    if not is_gpu(device):
        return psutil.virtual_memory().available
    free, _ = _own(device).mem_get_info(device)
    # Memory that torch has reserved and does not use is free for this process, too.
    own = _own(device).memory_allocated(device)
    idle = _own(device).memory_reserved(device) - own
    return int(max(0, min(free + idle, memory_of(device) - own)))


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None


def give_back() -> None:
    """Return freed memory to the system, where the C library would keep it.

    glibc keeps freed pieces for later use. They rarely have the size that the next block asks for,
    so that the process would grow with every block.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
