"""Merges of all cases, each made once when a test asks for it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architectures.cases import CASES
from tests.architectures.seen import Seen, see
from tests.kit.texts import save_token_ids


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_token_ids(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def seen(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """Gives the outcome of a case; every case is merged once."""
    known: dict[str, Seen] = {}

    def of(name: str) -> Seen:
        if name not in known:
            known[name] = see(CASES[name], tmp_path_factory.mktemp(name), texts)
        return known[name]

    return of
