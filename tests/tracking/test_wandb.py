"""Runs of W&B without a network, read from the log that it would send."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from mergekit_dam.errors import DamError
from mergekit_dam.tracking.wandb import WeightsAndBiases
from tests.kit.tracked import curves_of_wandb, exit_code_of_wandb, offline_wandb


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with offline_wandb(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("failed", [True, False])
def test_a_run_offline_has_the_numbers_by_the_steps_of_their_group(
    offline: Path, failed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    run = WeightsAndBiases({"parameters": {"samples": 4321}}, quiet=True)
    run.put("layer_fits", {"before": 0.5}, 3)
    run.put("trials", {"KL_a": 0.25, "mean_KL": 0.125}, 0)  # a step that is lower
    run.put("layer_fits", {"before": 0.75}, 4)
    run.close(failed=failed)
    assert capfd.readouterr() == ("", "")
    assert curves_of_wandb(offline) == {
        "layer_fits/before": [(3, 0.5), (4, 0.75)],
        "trials/KL_a": [(0, 0.25)],
        "trials/mean_KL": [(0, 0.125)],
    }
    assert exit_code_of_wandb(offline) == int(failed)


def test_what_would_be_sent_has_the_configuration_and_nothing_of_the_machine(
    offline: Path,
) -> None:
    run = WeightsAndBiases({"parameters": {"samples": 4321}}, quiet=True)
    run.close(failed=False)
    wandb.teardown()
    (log,) = offline.rglob("*.wandb")
    sent = log.read_bytes() + b"".join(
        file.read_bytes() for file in (log.parent / "files").rglob("*") if file.is_file()
    )
    assert b'{"samples":4321}' in sent
    assert b"mergekit-dam" in sent  # the project
    for word in (str(offline), str(Path.home()), str(Path.cwd()), f"{socket.gethostname()}\n"):
        assert word.encode() not in sent


def test_a_project_of_the_environment_is_taken(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "merges-of-mine")
    WeightsAndBiases({}, quiet=True).close(failed=False)
    wandb.teardown()
    (log,) = offline.rglob("*.wandb")
    assert b"merges-of-mine" in log.read_bytes()


def test_a_run_that_cannot_be_begun_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.\nAnd more.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(DamError, match=r"'No API key configured\.'.*WANDB_MODE=offline"):
        WeightsAndBiases({}, quiet=True)
