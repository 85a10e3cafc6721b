"""Models and texts for merges on a GPU: larger than elsewhere, or nothing would run in parallel."""

import pytest
import torch

from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.texts import Calibration, save_calibration


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A Llama base and two fine-tunes of a width at which kernels differ from those of a CPU."""
    config = tiny_llama_config(hidden_size=128, intermediate_size=320, num_attention_heads=4)
    return save_models(tmp_path_factory.mktemp("models"), config, count=2)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder = tmp_path_factory.mktemp("texts")
    return (save_calibration(folder, seed=0), save_calibration(folder, seed=1, offset=24))
