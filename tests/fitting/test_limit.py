"""Conjugate gradients that stop at their limit say so."""

import logging
from pathlib import Path

import pytest

from mergekit_dam.fitting import solver
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.texts import Calibration


def test_a_fit_that_stops_at_the_limit_says_so_in_the_log_and_in_the_report(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(solver, "MAX_ITERATIONS", 0)
    with caplog.at_level(logging.WARNING, logger="mergekit_dam"):
        merged = merge(dam(llama_models.models, calibration), tmp_path / "out")
    linears = {n: e for n, e in merged.entries.items() if e["kind"] == "linear"}
    assert linears
    for name, entry in linears.items():
        stopped = entry["solver"]["stopped"]
        assert "at their limit of 0 iterations" in stopped
        assert "a larger `ridge`" in stopped
        assert f"{name}: {stopped}" in caplog.messages


def test_a_fit_that_converges_says_nothing(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="mergekit_dam"):
        merged = merge(dam(llama_models.models, calibration), tmp_path / "out")
    assert not any("stopped" in entry.get("solver", {}) for entry in merged.entries.values())
    assert not any("limit" in message for message in caplog.messages)
