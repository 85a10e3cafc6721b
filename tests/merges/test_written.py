"""What a merge writes names no path of the machine, and two merges write the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.lock.folder import THIS_RUN
from mergekit_dam.lock.schema import read_lock
from tests.kit.adapters import save_adapter
from tests.kit.merging import dam, merge
from tests.kit.models import Models, model_with_new_words
from tests.kit.projects import FITS, Project, save_project
from tests.kit.texts import Calibration


@pytest.fixture
def project(llama_models: Models, calibration: Calibration, tmp_path: Path) -> Project:
    return save_project(tmp_path / "project", llama_models, calibration)


def holding(folder: Path, path: Path) -> list[str]:
    """Names of the files that hold a path; headers of safetensors are in their bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted(file.name for file in files if str(path).encode() in file.read_bytes())


@pytest.mark.parametrize("fit", FITS)
def test_no_file_has_a_path_of_the_machine(
    project: Project, monkeypatch: pytest.MonkeyPatch, fit: str
) -> None:
    merged = project.merge(monkeypatch, **FITS[fit])
    assert holding(merged.path, project.root) == []
    assert merged.report["sources"] == ["models/model_0", "models/model_1", "models/base"]
    assert merged.report["calibration"]["models/model_0"]["files"] == ["texts/calibration_0.jsonl"]
    replayed = project.merge(monkeypatch, "replay", coefficients=str(merged.path))
    assert holding(replayed.path, project.root) == ["mergekit_config.yml"]  # as it was typed


def test_paths_that_the_user_typed_stand_in_the_configuration_alone(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    root = llama_models.base.parents[1]
    assert tmp_path.is_relative_to(root)
    configuration = dam(llama_models.models, calibration, base=llama_models.base)
    merged = merge(configuration, tmp_path / "out")
    assert holding(merged.path, root) == ["mergekit_config.yml"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_neither_adapters_nor_a_vocabulary_nor_texts_of_models_bring_paths(
    llama_models: Models, tmp_path: Path
) -> None:
    adapter = save_adapter(llama_models.base, tmp_path / "adapter")
    other, text = model_with_new_words(tmp_path)
    models = [Path(f"{llama_models.base}+{adapter}"), other]
    merged = merge(
        dam(models, ["self", text], settings={"tokenizer": {"source": "union"}}), tmp_path / "out"
    )
    assert holding(merged.path, llama_models.base.parents[1]) == ["mergekit_config.yml"]
    lock = read_lock(merged.path)
    assert [source.name for source in lock.sources] == ["base+adapter", "other"]
    assert lock.sources[0].adapter is not None
    assert lock.sources[0].adapter.files.keys() >= {"adapter_model.safetensors"}
    kept = lock.calibration["base+adapter"].kept
    assert kept == "dam_calibration.adapter.jsonl"
    assert kept in lock.output.files


@pytest.mark.parametrize(
    "fit",
    ["layer", pytest.param("layer+logits", marks=pytest.mark.slow)],
)
def test_two_merges_write_the_same_but_for_one_section_of_the_report(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fit: str,
) -> None:
    folders = []
    for place in ("here", "there"):
        project = save_project(tmp_path / place, llama_models, calibration)
        folders.append(project.merge(monkeypatch, **FITS[fit]).path)
    first, second = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in folders)
    for files in (first, second):
        files.pop("dam_report.html")  # it shows the times of its run
    reports: list[dict[str, Any]] = []
    for files in (first, second):
        reports.append(json.loads(files.pop("dam_report.json")))
        seconds = reports[-1].pop(THIS_RUN)
        assert seconds.keys() >= {"seconds", "peak_memory_bytes"}
    assert first == second
    assert reports[0] == reports[1]
    assert json.dumps(reports[0]) == json.dumps(reports[1])  # in the same order


def test_the_lock_says_what_was_read_and_written(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = project.merge(monkeypatch, **FITS["layer"])
    lock = read_lock(merged.path)
    assert [source.name for source in lock.sources] == merged.report["sources"][
        -1:
    ] + merged.report["sources"][:-1]
    for source in lock.sources:
        assert source.model.files.keys() == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    digests = {name: text.sha256 for name, text in lock.calibration.items()}
    assert digests == merged.report["calibration_sha256"]
    assert lock.parameters["merge"]["holdout"] == 0.125  # a default
    (group,) = lock.parameters["tensors"]
    assert group["parameters"]["ridge"] == 1e-2
    assert group["models"]["models/model_1"] == {"weight": 1.0, "loss_weight": 1.0}
    assert set(group["tensors"]) == merged.tensors.keys() == lock.output.tensors.keys()
    assert lock.configuration.startswith("base_model: models/base\n")


def test_parameters_of_some_tensors_stand_in_an_entry_of_their_own(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    ridge = [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]
    merged = project.merge(monkeypatch, **{**FITS["layer"], "ridge": ridge})
    groups = read_lock(merged.path).parameters["tensors"]
    assert {
        name: group["parameters"]["ridge"] for group in groups for name in group["tensors"]
    } == {name: 0.5 if "mlp" in name else 0.1 for name in merged.tensors}


def test_a_project_that_was_moved_gives_the_same_bytes(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    merged = project.merge(monkeypatch, **FITS["layer"])
    lock = (merged.path / "dam_lock.json").read_bytes()
    shutil.move(project.root, tmp_path / "moved")
    moved = Project(tmp_path / "moved")
    shutil.rmtree(moved.root / "out")
    assert (moved.merge(monkeypatch).path / "dam_lock.json").read_bytes() == lock
