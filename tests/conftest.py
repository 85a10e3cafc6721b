"""Session-wide fixtures: models and text that tests read and never change."""

from pathlib import Path

import pytest
import torch

from tests.models import Models, save_calibration, save_models, tiny_llama_config

# Nothing here is large enough for a second thread to help; on a busy machine they wait in turns.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A Llama base and two fine-tunes, fp32, untied."""
    return save_models(tmp_path_factory.mktemp("llama"), tiny_llama_config(), count=2)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two texts of different words, one for each model."""
    folder = tmp_path_factory.mktemp("calibration")
    return (
        save_calibration(folder, seed=0),
        save_calibration(folder, seed=1, offset=24),
    )
