"""Calibration texts of random words, and their tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.load import load_calibration
from tests.kit.models import VOCAB_SIZE
from tests.kit.tokenizers import VOCABULARY, WORDS

Calibration = tuple[Path, Path]
"""A text for each of two models."""


def save_calibration(
    path: Path, *, seed: int = 0, documents: int = 64, words: int = 24, offset: int = 0
) -> Path:
    """Write documents of random words as JSON lines with a `text`; returns the path.

    Args:
        path: path of the file, or of a folder for a file `calibration_SEED.jsonl`.
        words: words per document; each is one token, and <s> is one more.
        offset: index in `WORDS` of the word drawn most often, so that texts can differ in kind.
    """
    file = path if path.suffix else path / f"calibration_{seed}.jsonl"
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(len(WORDS)).sub(offset).remainder(len(WORDS))
    drawn = torch.multinomial(
        1.0 / (1.0 + ranks), documents * words, replacement=True, generator=generator
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as handle:
        for document in drawn.reshape(documents, words).tolist():
            handle.write(json.dumps({"text": " ".join(WORDS[index] for index in document)}) + "\n")
    return file


def save_token_ids(folder: Path) -> list[Path]:
    """Write token ids of two kinds of text; returns a path for each.

    Ids are written because Qwen2's own tokenizer class turns all words into one unknown token.
    """
    files = []
    for index in range(2):
        texts = save_calibration(folder / f"text_{index}.jsonl", seed=index, offset=24 * index)
        rows = [json.loads(line)["text"].split() for line in texts.read_text("utf-8").splitlines()]
        files.append(folder / f"ids_{index}.jsonl")
        ids = [json.dumps({"input_ids": [VOCABULARY.index(word) for word in row]}) for row in rows]
        files[-1].write_text("\n".join(ids), encoding="utf-8")
    return files


def save_text(path: Path, words: Sequence[str], seed: int = 0) -> Path:
    """Documents of random words, some of them more often than others."""
    generator = torch.Generator().manual_seed(seed)
    chances = 1.0 / torch.arange(1, len(words) + 1)
    drawn = torch.multinomial(chances, 64 * 24, replacement=True, generator=generator)
    lines = [" ".join(words[i] for i in row) for row in drawn.reshape(64, 24).tolist()]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    return path


def calibration_tokens(
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int = 16,
    vocab_size: int = VOCAB_SIZE,
) -> Tensor:
    """The tokens that a merge takes from a text, int64 `[samples, sequence_length]`."""
    return load_calibration(
        str(text),
        model="a model",
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        seed=0,
    ).tokens
