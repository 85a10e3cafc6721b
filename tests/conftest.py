"""Fixtures of the whole session: models and text that tests read and never change."""

import signal
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.texts import save_calibration
from tests.kit.tokenizers import byte_tokenizer
from tests.kit.vocabularies import Pair, save_pair

# Nothing here is large enough for a second thread to help; on a busy machine they wait in turns.
torch.set_num_threads(1)

# What a shell starts in the background ignores ctrl-C, and so does all that is started by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds nothing by itself, has bos and eos, no chat template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"))
