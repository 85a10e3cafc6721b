"""Exchanges with the other processes of a merge, which a signal can end while a peer is awaited.

A peer that stops closes its sockets, and gloo fails. At times it does not (torch 2.13): a send that
begins as the peer stops has no end. Then torchrun's SIGTERM ends the wait, for Python handles
signals between two calls, and so a wait is many short ones. NCCL's exchanges are waited for by the
device, where its watchdog ends them.
"""

import atexit
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mergekit_dam.errors import DamError

LOG = logging.getLogger(__name__)

_PATIENCE = timedelta(days=7)
"""Longest wait for a peer, which may be downloading."""

_AT_A_TIME = timedelta(seconds=0.5)
"""Longest time in which no signal is handled."""

_under_way = threading.Event()
"""Is set while an exchange is under way, and for ever where this process has left one."""


def connect(backend: str) -> None:
    """Connect to the other processes until the interpreter ends.

    Args:
        backend: torch's name of what carries the exchanges.
    """
    dist.init_process_group(backend, timeout=_PATIENCE)
    # gloo's threads must end before the interpreter does: it aborts at times if they do not.
    atexit.register(_disconnect)


def total(x: Tensor) -> Tensor:
    """The sum of a contiguous tensor over all processes, in its place.

    Raises:
        DamError: another process has stopped.
    """
    _exchange(lambda: dist.all_reduce(x, async_op=True), on_device=x.is_cuda)
    return x


def first_ones(value: Any) -> Any:
    """The first process's value, which is sent as `pickle` has it.

    As `torch.distributed.broadcast_object_list`, whose waits hear no signal.

    Raises:
        DamError: another process has stopped.
    """
    first = dist.get_rank() == 0
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    length = torch.tensor(len(data))
    _exchange(lambda: dist.broadcast(length, 0, async_op=True))
    if not first:
        data = torch.empty(int(length), dtype=torch.uint8)
    _exchange(lambda: dist.broadcast(data, 0, async_op=True))
    return value if first else pickle.loads(data.numpy().data)  # from a process of this merge


def _exchange(begin: Callable[[], "dist.Work | None"], *, on_device: bool = False) -> None:
    """Make an exchange, and wait for its end; on a device, what is queued there waits instead.

    Raises:
        DamError: another process has stopped, or this one has left an exchange before its end.
    """
    if _under_way.is_set():
        raise DamError(
            "an earlier merge of this process was interrupted in the middle of an exchange with "
            "the others, which cannot go on; start all processes again"
        )
    work = None
    _under_way.set()
    try:
        work = begin()
        assert work is not None
        while not (on_device or work.is_completed()):
            with suppress(RuntimeError):  # it failed, or goes on
                work.wait(_AT_A_TIME)
        work.wait()
    except RuntimeError as error:
        if not on_device and work is not None and not work.is_completed():
            raise  # by the handler of a signal
        _under_way.clear()
        LOG.debug("exchange", exc_info=error)
        raise DamError("another process of this merge has stopped; its output says why") from error
    _under_way.clear()


def _disconnect() -> None:
    """Leave the other processes; where an exchange is still under way, end this one at once."""
    if _under_way.is_set():  # gloo would wait for its end
        try:
            with suppress(OSError, ValueError):  # what reads them may be gone
                logging.shutdown()
                sys.stderr.flush()
                sys.stdout.flush()
        finally:
            os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
