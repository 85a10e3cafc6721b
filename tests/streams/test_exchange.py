"""Exchanges between processes end with all of them, with a failure, or with a signal."""

import atexit
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mergekit_dam.errors import DamError
from mergekit_dam.streams import exchange

_ONE_IS_SILENT = """
import functools, sys, torch
from mergekit_dam.interrupts import terminable
from mergekit_dam.streams import exchange

rank, store, call = int(sys.argv[1]), sys.argv[2], sys.argv[3]
init = torch.distributed.init_process_group
torch.distributed.init_process_group = functools.partial(
    init, rank=rank, world_size=2, init_method=f"file://{store}"
)
exchange.connect("gloo")
if rank == 0:
    sys.stdin.read()
with terminable():
    print("waits", flush=True)
    try:
        eval(call)
    finally:
        print("cleaned up", end="")
"""
"""One of two processes, of which the second waits for the first."""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[list[Callable[[], object]]]:
    """A connection of one process to itself; yields what is to run before the interpreter ends."""
    at_exit: list[Callable[[], object]] = []
    init = dist.init_process_group

    def connect(backend: str, **options: Any) -> None:  # without a port
        init(backend, rank=0, world_size=1, init_method=f"file://{tmp_path}/store", **options)

    with (
        mock.patch.object(dist, "init_process_group", connect),
        mock.patch.object(atexit, "register", at_exit.append),
    ):
        exchange.connect("gloo")
    yield [end for end in at_exit if end.__module__ == exchange.__name__]
    if dist.is_initialized():
        dist.destroy_process_group()


def test_exchanges_of_one_process_return_what_they_got(alone: list[object]) -> None:
    assert alone
    x = torch.arange(3.0)
    assert exchange.total(x) is x
    assert x.tolist() == [0, 1, 2]
    value = {"a": [1, None]}
    assert exchange.first_ones(value) is value


def test_processes_are_disconnected_before_the_interpreter_ends(
    alone: list[Callable[[], object]],
) -> None:
    (end,) = alone
    assert dist.is_initialized()
    end()
    assert not dist.is_initialized()


def test_an_exchange_that_fails_says_that_another_process_has_stopped() -> None:
    broken = mock.Mock()
    broken.is_completed.return_value = True
    broken.wait.side_effect = RuntimeError("Connection closed by peer")
    with (
        mock.patch.object(dist, "all_reduce", return_value=broken),
        pytest.raises(DamError, match="another process of this merge has stopped"),
    ):
        exchange.total(torch.zeros(3))


def test_an_exchange_may_take_longer_than_one_wait() -> None:
    slow = mock.Mock()
    slow.is_completed.side_effect = [False, False, False, False, True]
    slow.wait.side_effect = [RuntimeError("timed out"), RuntimeError("timed out"), None]
    with mock.patch.object(dist, "all_reduce", return_value=slow):
        exchange.total(torch.zeros(3))
    assert slow.wait.call_count == 3


@pytest.mark.parametrize("call", ["exchange.total(torch.ones(2))", "exchange.first_ones(1)"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 1)]
)
def test_a_signal_ends_the_wait_for_a_silent_process(
    tmp_path: Path, call: str, number: int, status: int
) -> None:
    silent, waiting = (
        subprocess.Popen(
            [sys.executable, "-c", _ONE_IS_SILENT, str(rank), tmp_path / "store", call],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "waits\n"
    time.sleep(0.2)  # the exchange has begun
    waiting.send_signal(number)
    output, _ = waiting.communicate(timeout=20)
    assert output == "cleaned up"
    assert waiting.returncode == status
    silent.kill()
    silent.communicate()
