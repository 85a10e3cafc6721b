"""Tokenizers, and files that tests write."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.calibration.sets import CalibrationSet
from tests.kit.tokenizers import CHAT, SENTENCE, byte_tokenizer

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Write = Callable[..., str]
Load = Callable[..., CalibrationSet]


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Adds bos by itself; its template writes bos too."""
    return byte_tokenizer(adds_bos=True, chat=CHAT)


@pytest.fixture(scope="session")
def tokenizer_factory() -> MakeTokenizer:
    return byte_tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write text, bytes, or rows as JSON lines, under tmp_path; returns the path."""

    def write(name: str, content: str | bytes | Iterable[Any]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        return path.as_posix()

    return write


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Load:
    """`load_calibration` with small defaults."""

    def load(text: str, **changes: Any) -> CalibrationSet:
        settings: dict[str, Any] = {
            "model": "org/math",
            "tokenizer": tokenizer,
            "samples": 2,
            "sequence_length": 8,
            "vocab_size": 1000,
            "seed": 0,
        }
        return load_calibration(text, **{**settings, **changes})

    return load


@pytest.fixture
def texts() -> list[str]:
    """Twenty short documents of different words."""
    words = SENTENCE.split()
    return [f"{words[i % 16]} {words[(3 * i) % 16]} number {i}" for i in range(20)]
