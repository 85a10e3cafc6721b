"""Tokenizers made in code, files written by tests."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.calibration.sets import CalibrationSet

WORDS = "the quick brown fox jumps over a lazy dog while numbers 0 1 2 3 add up to sums "
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
)
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Write = Callable[..., str]
Load = Callable[..., CalibrationSet]


def make_tokenizer(
    *, bos: bool = True, eos: bool = True, adds_bos: bool = False, chat: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE without unknown tokens. `adds_bos`: its post-processor adds bos."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    special = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{key: value for key, value in special.items() if value}
    )
    tokenizer.chat_template = chat
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds nothing by itself, has bos and eos, no chat template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Adds bos by itself; its template writes bos too."""
    return make_tokenizer(adds_bos=True, chat=CHAT)


@pytest.fixture(scope="session")
def tokenizer_factory() -> MakeTokenizer:
    return make_tokenizer


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
    words = WORDS.split()
    return [f"{words[i % 16]} {words[(3 * i) % 16]} number {i}" for i in range(20)]
