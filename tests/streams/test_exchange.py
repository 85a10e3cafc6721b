"""Exchanges between processes end with all of them, with a failure, or with a signal."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mergekit_dam.errors import DamError
from mergekit_dam.streams import exchange
from tests.kit.processes import connecting_alone
from tests.kit.signals import Running

_ONE_IS_SILENT = """
import functools, sys, time, torch
from mergekit_dam.interrupts import terminable
from mergekit_dam.streams import exchange

rank, store, call = int(sys.argv[1]), sys.argv[2], sys.argv[3]
init = torch.distributed.init_process_group
torch.distributed.init_process_group = functools.partial(
    init, rank=rank, world_size=2, init_method=f"file://{store}"
)
exchange.connect("gloo")
if rank == 0:
    print("silent", flush=True)
    time.sleep(600)
with terminable():
    print("waits", flush=True)
    try:
        eval(call)
    finally:
        print("cleaned up")
"""
"""One of two processes, of which the second waits for the first."""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[list[Callable[[], object]]]:
    """A connection of one process to itself; yields what is to run before the interpreter ends."""
    with connecting_alone(tmp_path) as at_exit:
        exchange.connect("gloo")
    yield at_exit
    if dist.is_initialized():
        dist.destroy_process_group()


def test_exchanges_of_one_process_return_what_they_got(alone: list[object]) -> None:
    assert alone
    x = torch.arange(3.0)
    assert exchange.total(x) is x
    assert x.tolist() == [0, 1, 2]
    value = {"a": [1, None]}
    assert exchange.first_ones(value) is value


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
    slow.is_completed.side_effect = [False, False, True]
    slow.wait.side_effect = [RuntimeError("timed out"), RuntimeError("timed out"), None]
    with mock.patch.object(dist, "all_reduce", return_value=slow):
        exchange.total(torch.zeros(3))
    assert slow.wait.call_count == 3


def test_a_process_that_has_left_an_exchange_makes_no_other(
    alone: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would take it for the one that they are at."""
    left = mock.Mock()
    left.is_completed.return_value = False
    left.wait.side_effect = KeyboardInterrupt
    monkeypatch.setattr(exchange, "_under_way", threading.Event())
    with (
        mock.patch.object(dist, "all_reduce", return_value=left),
        pytest.raises(KeyboardInterrupt),
    ):
        exchange.total(torch.zeros(3))
    with pytest.raises(DamError, match="start all processes again"):
        exchange.first_ones(1)
    (end,) = alone
    monkeypatch.setattr(sys.stdout, "flush", mock.Mock(side_effect=BrokenPipeError))
    with (
        mock.patch.object(os, "_exit", side_effect=SystemExit) as ended,
        pytest.raises(SystemExit),
    ):
        end()
    ended.assert_called_once_with(1)


def test_the_error_of_a_signal_s_handler_is_its_own() -> None:
    left = mock.Mock()
    left.is_completed.side_effect = [True, False]
    left.wait.side_effect = RuntimeError("asked to end")
    with (
        mock.patch.object(exchange, "_under_way", threading.Event()) as under_way,
        mock.patch.object(dist, "all_reduce", return_value=left),
        pytest.raises(RuntimeError, match="asked to end"),
    ):
        exchange.total(torch.zeros(3))
    assert under_way.is_set()


@contextmanager
def running(rank: int, folder: Path, call: str) -> Iterator[Running]:
    command = [sys.executable, "-c", _ONE_IS_SILENT, str(rank), str(folder / "store"), call]
    found = Running(command, folder / f"{rank}.log")
    try:
        yield found
    finally:
        found.send(signal.SIGKILL)
        found.finish()


@pytest.mark.parametrize("call", ["exchange.total(torch.ones(2))", "exchange.first_ones(1)"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_silent_process(
    tmp_path: Path, call: str, number: signal.Signals
) -> None:
    with running(0, tmp_path, call) as silent, running(1, tmp_path, call) as waiting:
        silent.wait_for("silent")
        waiting.wait_for("waits")
        time.sleep(0.2)  # the exchange has begun
        waiting.send(number)
        began = time.monotonic()
        assert waiting.finish() != 0
        assert time.monotonic() - began < 60
        assert "cleaned up" in waiting.printed
