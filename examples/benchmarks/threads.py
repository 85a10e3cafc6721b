"""Seconds per step of a descent with one thread and with two, while more or less else runs.

One descent of the models of a demo goes through the surroundings in turns, and takes a step with
every number of threads in each, so that whatever else runs slows all alike. Quotas, and `--shares`,
need a control group that can be made. With shares, the descent and the busy processes that it
starts go before other work: the default of a group is 1024.

    mergekit-dam demo demo
    python -m examples.benchmarks.threads demo --rounds 10
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from examples.benchmarks.measuring.tables import markdown_table
from mergekit_dam.demo.recipes import recipe
from mergekit_dam.demo.settings import DemoSettings
from mergekit_dam.search.descender import Descender

THREADS = (1, 2)
GROUPS = Path("/sys/fs/cgroup/cpu")
"""Control groups, of version 1."""

Surrounding = Callable[[], AbstractContextManager[object]]


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Other processes that compute all the time."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(count)]
    time.sleep(0.2)
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextlib.contextmanager
def affinity(processors: int) -> Iterator[None]:
    """Every thread of this process may use the first processors alone, as by taskset."""
    before = os.sched_getaffinity(0)
    _set_affinity(set(sorted(before)[:processors]))
    try:
        yield
    finally:
        _set_affinity(before)


def _set_affinity(processors: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), processors)


@contextlib.contextmanager
def control_group(shares: int) -> Iterator[Path | None]:
    """A control group of this process, and of those that it starts; None where none can be made."""
    if not os.access(GROUPS, os.W_OK):
        yield None
        return
    group = GROUPS / f"dam-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.shares").write_text(str(shares))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield group
    finally:
        (GROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@contextlib.contextmanager
def quota(group: Path, processors: float) -> Iterator[None]:
    """The group gets so much processor time, as a container does."""
    limit = group / "cpu.cfs_quota_us"
    limit.write_text(str(int(processors * int((group / "cpu.cfs_period_us").read_text()))))
    try:
        yield
    finally:
        limit.write_text("-1")


def surroundings(group: Path | None) -> dict[str, Surrounding]:
    """What a step is measured in, by name."""
    found: dict[str, Surrounding] = {
        "alone": contextlib.nullcontext,
        "beside two busy processes": lambda: busy(2),
        "on one processor (taskset)": lambda: affinity(1),
    }
    if group is not None:
        found["quota of one processor"] = lambda: quota(group, 1.0)
        found["quota of one and a half"] = lambda: quota(group, 1.5)
    return found


def measure(demo: Path, rounds: int, group: Path | None) -> dict[str, list[tuple[float, ...]]]:
    """Seconds of a step with each number of threads, by surrounding, for every round."""
    found = surroundings(group)
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in found}
    stock = Descender.step
    turns = iter([*found.items()] * (rounds + 1))

    def measured(*arguments: Any) -> float:
        name, surrounding = next(turns)
        own = []
        with surrounding():
            for threads in THREADS:
                torch.set_num_threads(threads)
                began = time.perf_counter()
                loss = stock(*arguments)
                own.append(time.perf_counter() - began)
        times[name].append(tuple(own))
        return loss

    configuration = yaml.safe_load(recipe("dam", demo, DemoSettings()))
    own = {"objective": "logits", "steps": len(found) * (rounds + 1), "samples": 8}
    configuration["parameters"].update(own)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Descender, "step", measured),
    ):
        run_merge(
            MergeConfiguration.model_validate(configuration), folder, MergeOptions(quiet=True)
        )
    return {name: own[1:] for name, own in times.items()}  # the first round warms up


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="folder of `mergekit-dam demo`")
    parser.add_argument("--rounds", type=int, default=10, help="steps per number of threads")
    parser.add_argument("--shares", type=int, default=1024, help="weight beside other work")
    arguments = parser.parse_args()
    with control_group(arguments.shares) as group:
        found = measure(arguments.demo.absolute(), arguments.rounds, group)
    rows = []
    for name, pairs in found.items():
        one, two = (statistics.median(own) for own in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append([name, f"{one:.2f}", f"{two:.2f}", f"{ratio:.2f}"])
    print(markdown_table(["", "1 thread, s", "2 threads, s", "ratio"], rows, prose=False))


if __name__ == "__main__":
    main()
