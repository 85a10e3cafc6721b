"""Merges that are killed leave a clean folder."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.kit.merging import dam
from tests.kit.models import Models
from tests.kit.processes import BIN, torchrun
from tests.kit.texts import Calibration


def wait(ready: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    """Wait until a merge under way is so far."""
    deadline = time.monotonic() + 120
    while not ready():
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


KILLED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    # Shards are written while later stages are fitted; the last, the head, takes a while.
    "one sweep": (
        {"samples": 40, "sequence_length": 32, "holdout": 0.8},
        ["--out-shard-size", "2K"],
        "model-*",
    ),
    "search": ({"objective": "logits", "steps": 100_000}, [], ".dam-entered/*"),
}
"""Parameters, options, and files that tell that the fit is under way."""


def start(
    fit: str, models: Models, calibration: Calibration, folder: Path
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a merge to `out` in a folder, and wait until its fit is under way.

    Returns:
        torchrun, and its two processes in the order of their ranks.
    """
    parameters, options, files = KILLED[fit]
    configuration = folder / "dam.yaml"
    configuration.write_text(
        yaml.safe_dump(dam(models.models, calibration, **parameters)), encoding="utf-8"
    )
    running = torchrun(
        "--no-python", BIN / "mergekit-yaml", configuration, folder / "out", *options
    )
    wait(lambda: any(folder.glob(f".dam-out/new/out/{files}")), running)
    children = psutil.Process(running.pid).children()
    found = {process.environ().get("RANK"): process for process in children}
    return running, [found["0"], found["1"]]


@pytest.mark.slow
@pytest.mark.parametrize("fit", KILLED)
def test_a_killed_process_stops_the_other_and_leaves_a_clean_folder(
    llama_models: Models, calibration: Calibration, tmp_path: Path, fit: str
) -> None:
    running, (_, second) = start(fit, llama_models, calibration, tmp_path)
    second.kill()
    output, _ = running.communicate(timeout=60)
    # The other says that one has stopped, unless torchrun ends it before it notices.
    assert running.returncode != 0, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dam.yaml"]


@pytest.mark.slow
def test_a_process_that_waits_for_a_silent_one_ends_when_it_is_told_to(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    running, (first, second) = start("search", llama_models, calibration, tmp_path)
    second.suspend()
    try:
        # It comes to where it needs the other.
        wait(lambda: first.cpu_percent(interval=0.5) < 10, running)
        first.terminate()
        first.wait(timeout=20)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dam.yaml"]
    finally:
        second.kill()
    output, _ = running.communicate(timeout=60)
    assert running.returncode != 0, output
