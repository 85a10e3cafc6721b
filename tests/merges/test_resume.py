"""A merge that is stopped continues, and writes the bytes of one that nothing has stopped."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam import journal as journal_module
from mergekit_dam.streams import progress
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.texts import Calibration

TIMES = ("seconds", "peak_memory_bytes")


def contents(folder: Path) -> dict[str, Any]:
    """Digests of all files of a merge; its report without what clocks and memory say."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    report = json.loads((folder / "dam_report.json").read_text("utf-8"))
    found["dam_report.json"] = untimed(report)
    return found


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: untimed(own) for key, own in value.items() if key not in TIMES}
    return [untimed(own) for own in value] if isinstance(value, list) else value


class Stopped(BaseException):
    """Like ctrl-C, which would end the tests."""


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, line: str) -> Iterator[list[str]]:
    """Raise where a line of progress begins so; yields all lines, and what is said to stay."""
    lines: list[str] = []

    def show(text: str) -> None:
        lines.append(text)
        if text.startswith(line):
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(progress, "show", show)
        yield lines


SEARCH = {"samples": 6, "holdout": 1 / 3, "batch_size": 2, "learning_rate": 5e-3}
FITS: dict[str, dict[str, Any]] = {
    "layer, identity": {"objective": "layer", "metric": "identity"},
    "layer, sensitivity": {"objective": "layer", "metric": "sensitivity"},
    "logits": {"objective": "logits", "steps": 6, **SEARCH},
    "both": {"objective": "layer+logits", "metric": "sensitivity", "steps": 6, **SEARCH},
}
STOPS: dict[str, list[str]] = {
    "layer, identity": ["block 1/2", "block 2/2", "output"],
    "layer, sensitivity": ["start block 2/2", "backward block 1/2", "block 2/2", "output"],
    "logits": ["start block 2/2", "step 1/", "step 4/", "step 6/"],
    "both": ["start block 1/2", "backward block 2/2", "block 2/2", "output", "step 2/", "step 5/"],
}
CASES = [(fit, stop) for fit, stops in STOPS.items() for stop in stops]


@pytest.fixture(autouse=True)
def every_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models: states may take as long as they take."""
    monkeypatch.setattr(journal_module, "SHARE", float("inf"))


@pytest.fixture(scope="module")
def undisturbed(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for fit, own in FITS.items():
        configuration = configured(llama_models, calibration, own)
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        found[fit] = contents(merge(configuration, out).path)
    return found


def configured(models: Models, calibration: Calibration, own: Mapping[str, Any]) -> dict[str, Any]:
    return dam(
        models.models,
        calibration,
        base=models.base,
        correction="low_rank",
        correction_rank=2,
        **own,
    )


@pytest.mark.parametrize(("fit", "stop"), CASES)
def test_stopped_and_continued_it_has_the_same_bytes(
    fit: str,
    stop: str,
    llama_models: Models,
    calibration: Calibration,
    undisturbed: dict[str, Mapping[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configuration = configured(llama_models, calibration, FITS[fit])
    out = tmp_path / "out"
    with pytest.raises(Stopped), stopped_at(monkeypatch, stop):
        merge(configuration, out)
    assert not out.exists()
    with stopped_at(monkeypatch, "never") as lines:
        merge(configuration, out)
    print(lines)
    assert contents(out) == undisturbed[fit]
    assert not any(tmp_path.glob(".dam-*"))
