"""Merges that are killed again and again, at any moment, until one gets through."""

import random
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.kit.models import Models
from tests.kit.processes import BIN
from tests.kit.resuming import FITS, configured, contents
from tests.kit.signals import Running
from tests.kit.texts import Calibration

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows"),
]

KILLS = 5
"""How often each kind of merge is killed."""


@pytest.mark.parametrize("fit", FITS)
def test_killed_at_random_it_has_the_same_bytes(
    fit: str, llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    file, out = tmp_path / "dam.yaml", tmp_path / "work" / "out"
    configuration = configured(llama_models, calibration, fit, samples=24)
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")

    def started(folder: Path) -> Running:
        return Running([BIN / "mergekit-yaml", file, folder], tmp_path / "log")

    began = time.monotonic()
    assert started(tmp_path / "undisturbed" / "out").finish() == 0
    took = time.monotonic() - began
    expected = contents(tmp_path / "undisturbed" / "out")
    moment = random.Random(f"moments of {fit}")
    for _ in range(KILLS):
        running = started(out)
        # From the begin of the work on, which importing everything takes a while to reach.
        running.wait(lambda: (out.parent / ".dam-out" / "kept").exists() or out.exists())
        time.sleep(moment.random() * took / 2)
        running.send(signal.SIGKILL)
        if running.finish() == 0:
            break
    continued = started(out)
    assert continued.finish() == 0, continued.printed
    assert contents(out) == expected
    assert not any(out.parent.glob(".dam-*"))
