"""Merges, and models and text, that several files read and never change."""

from pathlib import Path
from typing import Any

import pytest

from tests.kit.families import LAYERS, Family
from tests.kit.inputs import Inputs
from tests.kit.merging import HELD_OUT, SAMPLES, Merged, dam, merge
from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.texts import Calibration, save_calibration
from tests.kit.vocabularies import Pair


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Family:
    folder = tmp_path_factory.mktemp("shapes")
    models = save_models(folder, tiny_llama_config(num_hidden_layers=LAYERS), count=3)
    texts = tuple(save_calibration(folder, seed=k, offset=16 * k) for k in range(4))
    return Family(models, texts)


@pytest.fixture
def inputs(llama_models: Models, calibration: tuple[Path, Path], tmp_path: Path) -> Inputs:
    return Inputs(tmp_path, list(llama_models.models), llama_models.base, list(calibration))


@pytest.fixture(scope="session")
def configuration(llama_models: Models, calibration: Calibration) -> dict[str, Any]:
    return dam(
        llama_models.models,
        calibration,
        base=llama_models.base,
        samples=SAMPLES,
        holdout=HELD_OUT / SAMPLES,
    )


@pytest.fixture(scope="session")
def merged(configuration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return merge(configuration, tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture(scope="session")
def union(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """Both vocabularies in one, and layers fitted."""
    return merge(pair.dam(), tmp_path_factory.mktemp("union") / "out")
