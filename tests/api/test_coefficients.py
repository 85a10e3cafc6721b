"""`Coefficients` and `report` from Python."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mergekit_dam
from mergekit_dam import Coefficients, DamError
from tests.kit.models import MLP

STORED = "dam_coefficients.safetensors"


def test_rows_are_those_of_the_file_by_model_and_tensor(folder: Path) -> None:
    stored = load_file(folder / "merged" / STORED)
    found = Coefficients.load("merged")
    assert found.models == ("models/math", "models/animals")
    assert found.tensors == tuple(sorted(stored))
    for row, model in enumerate(found.models):
        assert torch.equal(found.of(model, MLP), stored[MLP][row])
    assert torch.equal(found[MLP], stored[MLP])


def test_a_change_of_what_was_handed_out_does_not_reach_the_coefficients(folder: Path) -> None:
    found = Coefficients.load("merged")
    before = found[MLP]
    found[MLP].zero_()
    found.of("models/math", MLP).zero_()
    assert torch.equal(found[MLP], before)


def test_what_is_saved_replays_the_merge_corrections_included(folder: Path) -> None:
    Coefficients.load("merged").save("kept")
    replay: Any = {
        "merge_method": "dam",
        "models": [{"model": "models/math"}, {"model": "models/animals"}],
        "parameters": {"coefficients": "kept"},
    }
    out = mergekit_dam.merge(replay, "replayed")
    merged, replayed = load_file("merged/model.safetensors"), load_file(out / "model.safetensors")
    assert Path("kept/dam_corrections.safetensors").is_file()
    assert all(torch.equal(merged[name], replayed[name]) for name in merged)


def test_changed_coefficients_merge_as_they_say(folder: Path) -> None:
    name = "model.norm.weight"
    changed = Coefficients.load("merged").with_tensor(name, [[0.25], [0.75]])
    changed.save("kept")
    replay: Any = {
        "merge_method": "dam",
        "models": [{"model": "models/math"}, {"model": "models/animals"}],
        "parameters": {"coefficients": "kept"},
    }
    out = mergekit_dam.merge(replay, "replayed")
    own = [load_file(f"models/{model}/model.safetensors")[name] for model in ("math", "animals")]
    expected = 0.25 * own[0] + 0.75 * own[1]
    torch.testing.assert_close(load_file(out / "model.safetensors")[name], expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0]], "required coefficients of shape"),
        ([[1.0], [float("nan")]], "not a finite number"),
        ([["a"], ["b"]], "required numbers"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(rows: Any, message: str, folder: Path) -> None:
    with pytest.raises(DamError, match=message):
        Coefficients.load("merged").with_tensor(MLP, rows)


def test_names_that_are_not_there_are_refused_with_those_that_are(folder: Path) -> None:
    found = Coefficients.load("merged")
    with pytest.raises(DamError, match="required one of models/math, models/animals, got 'math'"):
        found.of("math", MLP)
    with pytest.raises(DamError, match="none of this name: 'mlp'"):
        found["mlp"]
    with pytest.raises(DamError, match="no file at"):
        Coefficients.load("models/math")


def test_a_report_is_data_and_writes_what_is_asked_for_alone(folder: Path) -> None:
    before = sorted(Path("merged").iterdir())
    found = mergekit_dam.report("merged", html="page.html")
    assert found.sources == ("models/math", "models/animals")
    assert {tensor.name for tensor in found.tensors} == set(Coefficients.load("merged").tensors)
    assert Path("page.html").read_text("utf-8").startswith("<!")
    assert sorted(Path("merged").iterdir()) == before


def test_a_folder_without_a_report_is_refused(folder: Path) -> None:
    with pytest.raises(DamError, match="no such file"):
        mergekit_dam.report("models/math")
