"""Text for models that have learned nothing; the demo's generators make it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mergekit_dam.demo.arithmetic import word_problem
from mergekit_dam.demo.records import person_record
from mergekit_dam.demo.training import train_tokenizer

_KINDS: tuple[Callable[[random.Random], str], ...] = (word_problem, person_record)
_TRAINED_ON = 2000  # documents of each kind; they make some thousand tokens
_AT_ONCE = 256


def make_tokenizer(vocab: int, *, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab` tokens at most, trained on text of all kinds."""
    rng = random.Random(f"{seed}/tokenizer")
    documents = [make(rng) for make in _KINDS for _ in range(_TRAINED_ON)]
    return train_tokenizer(documents, vocab_size=vocab)


def write_text(
    path: Path, tokenizer: PreTrainedTokenizerFast, *, tokens: int, kind: int, seed: int
) -> None:
    """Write documents of at least `tokens` tokens together, one `text` per line.

    Args:
        kind: number of the text; equal numbers give equal text.
    """
    rng = random.Random(f"{seed}/{kind}")
    make = _KINDS[kind % len(_KINDS)]
    with path.open("w", encoding="utf-8") as file:
        while tokens > 0:
            documents = [make(rng) for _ in range(_AT_ONCE)]
            ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
            for document, own in zip(documents, ids, strict=True):
                file.write(json.dumps({"text": document}) + "\n")
                tokens -= len(own)
