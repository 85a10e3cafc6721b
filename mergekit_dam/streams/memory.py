"""What memory a merge may use: that of the host, and of the GPU up to a limit."""

import ctypes
import sys
from functools import cache
from typing import Any

import psutil
import torch


def limit_gpu(device: torch.device, limit: int | None) -> None:
    """Have this process use no more than so many bytes of a GPU; all there are if None.

    torch holds to it: beyond the limit, it runs out of memory, whatever else is free.
    """
    if device.type != "cuda":
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    fraction = 1.0 if limit is None else min(1.0, limit / whole)
    torch.cuda.set_per_process_memory_fraction(fraction, device)


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory that this process may use."""
    if device.type != "cuda":
        return psutil.virtual_memory().total
    whole = torch.cuda.get_device_properties(device).total_memory
    return int(whole * torch.cuda.get_per_process_memory_fraction(device))


def free_memory_of(device: torch.device) -> int:
    """Bytes of it that are free at the moment."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has reserved and does not use is free for it, too.
    own = torch.cuda.memory_allocated(device)
    idle = torch.cuda.memory_reserved(device) - own
    return max(0, min(free + idle, memory_of(device) - own))


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None


def give_back() -> None:
    """Return what has been freed to the system, where the C library would keep it.

    glibc keeps freed pieces for later, and a later stage finds none of them of its size: the
    process grows with every block, though nothing in it does.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
