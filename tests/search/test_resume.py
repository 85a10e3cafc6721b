"""Searches that are stopped in any of their parts, and go on from their journal."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.journal import Journal
from mergekit_dam.layers import sweep as sweep_module
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.search import descents as descents_module
from mergekit_dam.search.search import search
from tests.kit.networks import make
from tests.kit.resuming import Stopped, Told, watched
from tests.kit.settings import run_settings

SMALL = {"learning_rate": 5e-3, "batch_size": 2, "objective": "layer+logits"}


def searched(folder: Path, stop: str | None = None, **changes: Any) -> tuple[MergeRecord, Told]:
    """A search with corrections, from the journal in a folder."""
    settings = run_settings(**{**SMALL, **changes})
    made = make(base=True, correction="low_rank", correction_rank=2)
    with watched(stop) as told:
        journal = Journal(folder)
        found = search(
            made.network(), made.streams(9, 3), settings, made.average(), journal=journal
        )
    return found, told


def check(folder: Path, stop: str, **changes: Any) -> Told:
    """Assert that a search that is stopped ends as another one; what it shows after the stop."""
    expected, _ = searched(folder / "whole", **changes)
    with pytest.raises(Stopped):
        searched(folder / "stopped", stop, **changes)
    found, told = searched(folder / "stopped", **changes)
    assert found.coefficients.keys() == expected.coefficients.keys()
    for name, rows in expected.coefficients.items():
        assert found.coefficients[name].equal(rows)
        ours, theirs = found.correction(name), expected.correction(name)
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.tensors.keys() == theirs.tensors.keys()
            assert all(own.equal(theirs.tensors[key]) for key, own in ours.tensors.items())
    trials = [
        [dataclasses.replace(trial, seconds=0) for trial in record.trials]
        for record in (found, expected)
    ]
    assert trials[0] == trials[1]
    return told


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "mofo", "mofo_fraction": 0.4},
        {"gradient_accumulation": 2, "lr_schedule": "linear", "warmup": 0.3},
        {"lr_schedule": "inverse_sqrt", "warmup": 0.2, "max_grad_norm": 0.05},
        {"objective": "logits", "l1": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", ["step 2/", "step 4/"])
def test_a_descent_goes_on_with_its_moments_rates_and_sequences(
    changes: dict[str, Any], stop: str, tmp_path: Path
) -> None:
    told = check(tmp_path, stop, steps=5, **changes)
    assert len([line for line in told.shown if line.startswith("step")]) == 6 - int(stop[5])


@pytest.mark.parametrize("stop", ["step 1/4", "step 3/4"])
def test_a_second_descent_goes_on_behind_the_first(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first one has left so little that none would begin there."""
    monkeypatch.setattr(descents_module, "DESCENTS", (3, 4))
    monkeypatch.setattr(descents_module, "WORTHWHILE", 0.0)
    monkeypatch.setattr(descents_module, "ENOUGH", 0.0)
    changes: dict[str, Any] = {"steps": None, "learning_rate": 1e-3}
    record, _ = searched(tmp_path / "known", **changes)
    start, fitted, first, _ = (trial.mean_held_out_kl for trial in record.trials)
    assert first < fitted
    monkeypatch.setattr(descents_module, "ENOUGH", (fitted + first) / 2 / start)
    told = check(tmp_path, stop, **changes)
    assert not [line for line in told.shown if "block" in line or line.startswith("step 3/3")]


@pytest.mark.parametrize("stop", ["block 1/2", "block 2/2", "output"])
def test_a_second_sweep_goes_on_behind_the_first(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plain metric, where the first one was no good: here, both are."""

    def ruin(opened: Any, streams: Any, record: MergeRecord, **rest: Any) -> Any:
        result = fit_stage(opened, streams, record, **rest)
        for stream in streams:
            stream.merged = -stream.merged if opened.stage.kind == "block" else stream.merged
        return result

    monkeypatch.setattr(sweep_module, "fit_stage", ruin)
    changes = {"objective": "layer", "metric": "sensitivity"}
    with pytest.raises(Stopped):
        searched(tmp_path / "stopped", stop, **changes)  # in the first sweep
    told = check(tmp_path, stop, **changes)  # in the second one
    assert not [line for line in told.shown if line.startswith(("start", "backward"))]


def test_a_search_that_was_done_is_only_read(tmp_path: Path) -> None:
    first, _ = searched(tmp_path, steps=2)
    again, told = searched(tmp_path, steps=2)
    assert told.shown == []
    assert all(again.coefficients[name].equal(rows) for name, rows in first.coefficients.items())
