"""Exchanges with the other processes of a merge, which a signal can end while a peer is awaited.

A peer that stops closes its sockets, and gloo fails. At times it does not (torch 2.13): a send that
begins as the peer stops has no end. Then torchrun's SIGTERM ends the wait, for Python handles
signals between two calls, and so a wait is many short ones.
"""

import atexit
import logging
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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

_given_up: list[int] = []
"""Exit status of this process if it left an exchange before its end."""


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
    with _explained():
        _finish(dist.all_reduce(x, async_op=True), on_device=x.is_cuda)
    return x


def first_ones(value: Any) -> Any:
    """The first process's value, which is sent as `pickle` has it.

    Raises:
        DamError: another process has stopped.
    """
    first = dist.get_rank() == 0
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    length = torch.tensor(len(data))
    with _explained():
        _finish(dist.broadcast(length, 0, async_op=True))
        if not first:
            data = torch.empty(int(length), dtype=torch.uint8)
        _finish(dist.broadcast(data, 0, async_op=True))
    return value if first else pickle.loads(data.numpy().data)  # from a process of this merge


def _finish(work: "dist.Work", *, on_device: bool = False) -> None:
    """Wait for the end of an exchange; on a device, what is queued there waits instead.

    Raises:
        RuntimeError: the exchange failed.
    """
    try:
        while not (on_device or work.is_completed()):
            try:
                work.wait(_AT_A_TIME)
            except RuntimeError:  # it failed, or goes on
                if work.is_completed():
                    break
        work.wait()
    except RuntimeError:
        raise
    except BaseException as error:  # a signal
        _given_up.append(getattr(error, "code", 1))
        raise


def _disconnect() -> None:
    """Leave the other processes; where an exchange is still under way, with the whole process."""
    if _given_up:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_given_up[0])  # gloo would wait for the exchange
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    """Explain the error of an exchange that fails because another process has stopped."""
    try:
        yield
    except RuntimeError as error:
        LOG.debug("exchange", exc_info=error)
        raise DamError("another process of this merge has stopped; its output says why") from error
