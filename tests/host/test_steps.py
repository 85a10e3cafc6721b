"""mergekit-multi: pipelines with steps of the method dam."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.multimerge import main as mergekit_multi

from mergekit_dam.host.names import naming
from tests.kit.merging import Merged, dam, linear, merge
from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.texts import save_calibration


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return save_models(folder, tiny_llama_config(num_hidden_layers=1), count=3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    return [save_calibration(folder, seed=k, offset=16 * k) for k in range(3)]


def run(folder: Path, *steps: dict[str, Any], more: Sequence[str] = ()) -> Result:
    """Run a pipeline with intermediate results in `folder/steps`, and a last one in `out`."""
    LoaderCache.loaders.clear()
    file = folder / "steps.yml"
    file.write_text(yaml.safe_dump_all(steps), encoding="utf-8")
    paths = ["--intermediate-dir", folder / "steps", "--out-path", folder / "out", "--quiet"]
    return CliRunner().invoke(mergekit_multi, list(map(str, [file, *paths, *more])))


def test_dam_steps_before_between_and_after_others(
    models: Models, texts: list[Path], tmp_path: Path
) -> None:
    steps = tmp_path / "steps"
    result = run(
        tmp_path,
        {"name": "first", **dam(models.models[:2], texts)},
        {"name": "second", **linear([Path("first"), models.models[2]])},
        {"name": "third", **dam([Path("second"), models.models[0]], texts, base=Path("first"))},
        linear([Path("third"), Path("first")]),
    )
    assert result.exit_code == 0, result.output
    third = Merged(steps / "third")
    listed = os.path.relpath(models.models[0], tmp_path)
    assert third.coefficients.sources == ("steps/second", listed, "steps/first")
    for name, tensor in Merged(tmp_path / "out").tensors.items():
        expected = (third.tensors[name] + Merged(steps / "first").tensors[name]) / 2
        torch.testing.assert_close(tensor, expected)


def test_a_step_writes_what_a_merge_of_its_own_does(
    models: Models, texts: list[Path], tmp_path: Path
) -> None:
    configuration = dam(models.models[:2], texts, base=models.base)
    with naming(tmp_path):  # as of a file there
        alone = merge(configuration, tmp_path / "alone")
    result = run(tmp_path, {"name": "step", **configuration})
    assert result.exit_code == 0, result.output
    step = Merged(tmp_path / "steps" / "step")
    assert step.model_bytes == alone.model_bytes
    assert step.coefficient_bytes == alone.coefficient_bytes


def test_text_by_the_name_of_a_step_is_text(
    models: Models, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit alone would read the step's folder as calibration text."""
    monkeypatch.chdir(tmp_path)
    Path("python").mkdir()
    (tmp_path / "python" / "text.jsonl").write_bytes(texts[0].read_bytes())
    slices: list[dict[str, Any]] = [{"sources": [{"model": "python", "layer_range": [0, 1]}]}]
    slices[0]["sources"].append({"model": str(models.models[2]), "layer_range": [0, 1]})
    for source in slices[0]["sources"]:
        source["parameters"] = {"calibration": "python"}
    result = run(
        tmp_path,
        {"name": "python", **dam(models.models[:2], ["python", texts[1]])},
        {"name": "all", **dam([Path("python"), models.models[2]], calibration="python")},
        {"name": "sliced", **dam([], settings={"slices": slices, "models": None})},
    )
    assert result.exit_code == 0, result.output
    text = os.path.relpath(texts[1], tmp_path)
    for step in ("python", "all", "sliced"):
        calibration = Merged(tmp_path / "steps" / step).report["calibration"]
        assert {entry["source"] for entry in calibration.values()} <= {"python", text}


def test_a_step_may_go_on_from_an_earlier_one(
    models: Models, texts: list[Path], tmp_path: Path
) -> None:
    configuration = dam(models.models[:2], texts)
    searched = {**configuration["parameters"], "objective": "layer+logits", "steps": 1}
    result = run(
        tmp_path,
        {"name": "replayed", **dam(models.models[:2], coefficients="fitted")},
        {"name": "further", **configuration, "parameters": {**searched, "start": "fitted"}},
        {"name": "fitted", **configuration},
    )
    assert result.exit_code == 0, result.output
    fitted, replayed = (Merged(tmp_path / "steps" / name) for name in ("fitted", "replayed"))
    assert replayed.model_bytes == fitted.model_bytes
    assert Merged(tmp_path / "steps" / "further").report["search"][0]["name"] == "start"


def test_a_step_may_be_called_as_the_method_is(
    models: Models, texts: list[Path], tmp_path: Path
) -> None:
    result = run(
        tmp_path,
        {"name": "dam", **dam(models.models[:2], texts)},
        dam([Path("dam"), models.models[2]], texts),
    )
    assert result.exit_code == 0, result.output
    assert Merged(tmp_path / "out").coefficients.sources[0] == "steps/dam"


def test_a_step_that_is_refused_leaves_the_others_and_is_done_again(
    models: Models, texts: list[Path], tmp_path: Path
) -> None:
    first = {"name": "first", **linear(models.models[:2])}
    last = dam([Path("first"), models.models[2]], texts[:1])
    result = run(tmp_path, first, last)
    assert result.exit_code == 1
    assert "required `calibration`, text of the kind" in result.output
    written = (tmp_path / "steps" / "first" / "model.safetensors").stat().st_mtime_ns
    result = run(tmp_path, first, dam([Path("first"), models.models[2]], texts))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "steps" / "first" / "model.safetensors").stat().st_mtime_ns == written
