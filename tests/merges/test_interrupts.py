"""Searches that end early: by signals, sent to the stock command, or by `max_minutes`."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.merging import Merged, dam
from tests.kit.models import Models
from tests.kit.networks import files_under
from tests.kit.processes import BIN
from tests.kit.signals import Running
from tests.kit.texts import Calibration

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no signals to send on Windows"),
]

STEPS = 100_000
ANNOUNCED = "ctrl-C ends the descent"
ANSWERED = "Ctrl-C once more"


@pytest.fixture
def start(llama_models: Models, calibration: Calibration, tmp_path: Path) -> Any:
    """Starts a search that would take hours."""

    def start(*options: str, **parameters: Any) -> Running:
        long = {"objective": "layer+logits", "steps": STEPS, "learning_rate": 1e-3}
        configuration = dam(llama_models.models, calibration, **{**long, **parameters})
        file = tmp_path / "dam.yaml"
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        command: list[str | Path] = [BIN / "mergekit-yaml", file, tmp_path / "out", *options]
        return Running(command, tmp_path / "log")

    return start


def test_a_merge_ends_in_time(start: Any, tmp_path: Path) -> None:
    running = start(max_minutes=0.2)
    assert running.finish() == 0, running.printed
    merged = Merged(tmp_path / "out")
    merged.load()
    last = merged.report["search"][-1]
    if merged.report["left_out"]:  # on a machine that is very busy
        assert last["name"] == "layer, identity"
        assert "no time for a descent" in running.printed
    else:
        assert last["ended"] == "`max_minutes`"
        assert last["details"]["steps"] < STEPS
        took = sum(merged.report["this_run"]["trial_seconds"])
        assert took < 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_one_in_a_descent_writes_the_best_point_so_far(
    start: Any, tmp_path: Path, number: signal.Signals
) -> None:
    running = start("-vv", correction="low_rank", correction_rank=2)  # tells of every step
    running.wait_for(f"step 3/{STEPS}")
    assert ANNOUNCED in running.printed
    running.send(number)
    assert running.finish() == 0, running.printed
    assert ANSWERED in running.printed
    merged = Merged(tmp_path / "out")
    merged.load()
    *before, descent = merged.report["search"]
    assert descent["ended"] == "an interrupt"
    taken = int(descent["details"]["steps"])
    assert 3 <= taken < STEPS
    # No point of so long a descent would have been judged but for the interrupt.
    assert descent["details"]["best_step"] in (0, taken)
    assert f"ended the descent after {taken} of {STEPS} steps" in running.printed
    best = min(trial["mean_held_out_kl"] for trial in merged.report["search"])
    assert descent["mean_held_out_kl"] == pytest.approx(best)
    assert not any(trial["ended"] for trial in before)
    assert not [name for name in files_under(tmp_path) if ".dam-" in name]


def test_the_second_one_keeps_what_was_done(start: Any, tmp_path: Path) -> None:
    running = start(gradient_accumulation=STEPS)  # a step that takes hours
    running.wait_for(ANNOUNCED)
    running.send(signal.SIGINT)
    running.wait_for(ANSWERED)
    running.send(signal.SIGINT)
    assert running.finish() != 0
    assert f"what is done is kept in {tmp_path / '.dam-out'}" in running.printed
    assert not (tmp_path / "out").exists()
    assert {path.name for path in (tmp_path / ".dam-out").iterdir()} == {"kept", "lock"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_one_before_a_descent_keeps_what_was_done(
    start: Any, tmp_path: Path, number: signal.Signals
) -> None:
    # Layer fits of many sequences: there is time to stop them.
    options = {"samples": 40, "sequence_length": 32}
    running = start("--quiet", **options)
    running.wait(lambda: any(tmp_path.glob(".dam-out/kept/*.safetensors")))
    running.send(number)
    assert running.finish() != 0
    assert ANSWERED not in running.printed
    assert "the same command continues" in running.printed
    assert not (tmp_path / "out").exists()
    again = start("--quiet", **options)
    again.wait(lambda: any(tmp_path.glob(".dam-out/kept/descent-0.safetensors")))
    again.send(signal.SIGINT)
    assert again.finish() == 0, again.printed
    assert "continuing: " in again.printed
    Merged(tmp_path / "out").load()
    assert not any(tmp_path.glob(".dam-*"))


def test_stopped_at_once_it_leaves_nothing(start: Any, tmp_path: Path) -> None:
    running = start("--quiet", samples=40, sequence_length=32)
    running.wait(lambda: (tmp_path / ".dam-out" / "new").exists())
    running.send(signal.SIGTERM)
    assert running.finish() == 128 + signal.SIGTERM
    assert not any(tmp_path.glob(".dam-*"))
