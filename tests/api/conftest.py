"""A working directory as in the examples of the docstrings."""

import shutil
from pathlib import Path

import pytest
import yaml

import mergekit_dam
from tests.kit.models import Models
from tests.kit.texts import Calibration

CONFIGURATION = {
    "merge_method": "dam",
    "models": [{"model": "models/math"}, {"model": "models/animals"}],
    "parameters": {
        "samples": 4,
        "sequence_length": 16,
        "objective": "layer",
        "metric": "identity",
        "correction_rank": 2,
    },
}
NAMES = ("math", "animals")


@pytest.fixture(scope="session")
def made(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two models, their texts, `dam.yaml`, and a merge of them."""
    folder = tmp_path_factory.mktemp("api")
    for name, model, source in zip(NAMES, llama_models.models, calibration, strict=True):
        shutil.copytree(model, folder / "models" / name)
        shutil.copyfile(source, folder / f"{name}.jsonl")
    entries = [
        {"model": f"models/{name}", "parameters": {"calibration": f"{name}.jsonl"}}
        for name in NAMES
    ]
    text = yaml.safe_dump({**CONFIGURATION, "models": entries})
    (folder / "dam.yaml").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mergekit_dam.merge("dam.yaml", "merged")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the working directory."""
    own = tmp_path / "work"
    shutil.copytree(made, own)
    monkeypatch.chdir(own)
    return own
