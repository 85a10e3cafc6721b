"""Models by revision and by unusual names: each is the model that its name means, and no other."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from mergekit_dam.lock.schema import read_lock
from tests.kit.hub import run_command
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.projects import FITS, save_project
from tests.kit.texts import Calibration

COMMITS = {"v1": "1" * 40, "v2": "2" * 40}


@pytest.fixture
def cache(llama_models: Models, tmp_path: Path) -> Mapping[str, str]:
    """An environment without a connection, in whose cache a model has two revisions."""
    place = tmp_path / "home" / "hub" / "models--org--a"
    (place / "refs").mkdir(parents=True)
    for (tag, commit), folder in zip(COMMITS.items(), llama_models.models, strict=True):
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs" / tag).write_text(commit, encoding="utf-8")
    (place / "refs" / "main").write_text(COMMITS["v2"], encoding="utf-8")
    return {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}


def test_two_revisions_of_one_repository_are_two_models(
    llama_models: Models, calibration: Calibration, cache: Mapping[str, str], tmp_path: Path
) -> None:
    local = merge(dam(llama_models.models, calibration), tmp_path / "local")
    configuration = dam([Path(f"org/a@{tag}") for tag in COMMITS], calibration)
    (tmp_path / "dam.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    run_command(cache, tmp_path, "merge", "dam.yaml", "out", "--quiet")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == local.model_bytes
    lock = read_lock(tmp_path / "out")
    told = [(own.name, own.model.repository, own.model.revision) for own in lock.sources]
    assert told == [(f"org/a@{tag}", "org/a", commit) for tag, commit in COMMITS.items()]
    shown = json.loads((tmp_path / "out" / "dam_report.json").read_text("utf-8"))
    assert shown["revisions"] == {f"org/a@{tag}": commit for tag, commit in COMMITS.items()}
    # The lock names commits: a tag that moves leads to no other model.
    moved = Path(cache["HF_HOME"]) / "hub" / "models--org--a" / "refs" / "v1"
    moved.write_text(COMMITS["v2"], encoding="utf-8")
    again = json.loads(run_command(cache, tmp_path, "reproduce", "out", "--json"))
    assert again["byte_identical"]


def test_a_slash_at_the_end_makes_no_other_model(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    plain = merge(
        dam(
            [llama_models.base, *llama_models.models], [None, *calibration], base=llama_models.base
        ),
        tmp_path / "plain",
    )
    configuration = dam(
        [llama_models.base, *llama_models.models], [None, *calibration], base=llama_models.base
    )
    configuration["base_model"] += "/"
    slashed = merge(configuration, tmp_path / "slashed")
    assert slashed.coefficients.sources == plain.coefficients.sources
    assert slashed.model_bytes == plain.model_bytes


@pytest.mark.parametrize("name", ["qwen+math", "my model (v2), final", 'a "quoted" name', "é@1"])
def test_any_name_of_a_folder_works(
    name: str,
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = save_project(tmp_path / "project", llama_models, calibration)
    weights = project.merge(monkeypatch, **FITS["layer"]).model_bytes
    shutil.move(project.root / "models" / "model_0", project.root / "models" / name)
    configuration = yaml.safe_load((project.root / "dam.yaml").read_text("utf-8"))
    configuration["models"][0]["model"] = f"models/{name}"
    (project.root / "dam.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    named = project.merge(monkeypatch, "named")
    assert named.model_bytes == weights
    (first,) = (own for own in read_lock(named.path).sources if own.name == f"models/{name}")
    assert (first.model.repository, first.adapter) == (None, None)


def test_a_datasets_revision_is_pinned_in_the_lock(
    llama_models: Models, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, *, revision: str, **_: object) -> object:
        asked.append((path, revision))
        rows = [json.loads(line) for line in calibration[1].read_text("utf-8").splitlines()]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    def dataset_info(_: object, path: str, *, revision: str, **__: object) -> object:
        assert (path, revision) == ("org/data", "v1")
        return SimpleNamespace(sha=COMMITS["v1"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    texts: list[Path | str | None] = [calibration[0], "org/data@v1:split=test"]
    merged = merge(dam(llama_models.models, texts), tmp_path / "out")
    assert asked == [("org/data", COMMITS["v1"])]
    text = list(read_lock(merged.path).calibration.values())[1]
    assert (text.dataset, text.revision) == ("org/data", COMMITS["v1"])
    assert text.source == "org/data@v1:split=test"
