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


def killed_when(ready: Callable[[], bool], running: subprocess.Popen[str]) -> str:
    """Kill the second of two processes when the merge is so far; what they printed.

    Raises:
        subprocess.TimeoutExpired: the first does not end within a minute.
    """
    deadline = time.monotonic() + 120
    while not ready():
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (second,) = (
        process
        for process in psutil.Process(running.pid).children()
        if process.environ().get("RANK") == "1"
    )
    second.kill()
    output, _ = running.communicate(timeout=60)
    return output


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


@pytest.mark.slow
@pytest.mark.parametrize("fit", KILLED)
def test_a_killed_process_stops_the_other_and_leaves_a_clean_folder(
    llama_models: Models, calibration: Calibration, tmp_path: Path, fit: str
) -> None:
    parameters, options, files = KILLED[fit]
    configuration, out = tmp_path / "dam.yaml", tmp_path / "out"
    configuration.write_text(
        yaml.safe_dump(dam(llama_models.models, calibration, **parameters)), encoding="utf-8"
    )
    running = torchrun("--no-python", BIN / "mergekit-yaml", configuration, out, *options)
    output = killed_when(lambda: any(tmp_path.glob(f".dam-out/new/out/{files}")), running)
    # The other says that one has stopped, unless torchrun ends it before it notices.
    assert running.returncode != 0, output
    assert not out.exists()
    assert not any(tmp_path.glob(".dam-*"))
