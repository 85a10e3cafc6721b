"""Models and texts that the tests of evaluations read and never change."""

from pathlib import Path

import pytest

from tests.kit.judged import save_model, save_texts


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models with one tokenizer."""
    root = tmp_path_factory.mktemp("judged")
    return [save_model(root / name, seed=seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    return save_texts(tmp_path)
