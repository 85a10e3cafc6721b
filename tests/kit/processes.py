"""Two processes that torchrun starts, and processes that are made up."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from mergekit_dam.streams import distributed, exchange
from mergekit_dam.streams.stream import Stream
from tests.kit.merging import Merged

BIN = Path(sys.executable).parent


def torchrun(*command: str | Path) -> subprocess.Popen[str]:
    """Start two processes of a command."""
    return subprocess.Popen(
        [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_merges(
    configurations: Mapping[str, Any], folder: Path, *, device: str = "cpu"
) -> subprocess.Popen[str]:
    """Start merges by two processes: each merge goes to a subfolder of its name."""
    folder.mkdir(exist_ok=True)
    (folder / "merges.json").write_text(json.dumps(configurations), encoding="utf-8")
    return torchrun("-m", "tests.kit.worker", folder, device)


def finish(running: subprocess.Popen[str]) -> None:
    """Wait until the merges are written."""
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output


def difference(found: Merged, expected: Merged) -> float:
    """The largest difference of a coefficient, relative to the largest of its tensor."""
    ours, theirs = found.coefficients.coefficients, expected.coefficients.coefficients
    assert ours.keys() == theirs.keys()
    gaps = ((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max() for n in theirs)
    return max(float(gap) for gap in gaps)


@contextmanager
def connecting_alone(folder: Path) -> Iterator[list[Callable[[], object]]]:
    """Let a process connect to itself, without a port.

    Args:
        folder: folder for what processes know of each other.

    Yields:
        What exchanges want to be called before the interpreter ends; it is not called.
    """
    theirs: list[Callable[[], object]] = []
    init = dist.init_process_group

    def register(end: Callable[[], object]) -> None:
        if end.__module__ == exchange.__name__:
            theirs.append(end)

    def connect(_backend: str, **options: Any) -> None:
        init("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store", **options)

    with (
        mock.patch.object(dist, "init_process_group", connect),
        mock.patch.object(atexit, "register", register),
    ):
        yield theirs


@contextmanager
def process(rank: int, size: int) -> Iterator[None]:
    """Be one of several processes, as far as the division of the sequences goes."""
    with (
        mock.patch.object(distributed, "rank", return_value=rank),
        mock.patch.object(distributed, "size", return_value=size),
    ):
        yield


def streams_of(size: int, count: int, held_out: int, turn: int) -> list[Stream]:
    """The streams of all processes; every sequence is its number."""
    tokens = torch.arange(count)[:, None].expand(-1, 3)
    found = []
    for rank in range(size):
        with process(rank, size):
            found.append(Stream.of_tokens(0, tokens, held_out, turn=turn))
    return found
