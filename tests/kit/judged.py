"""Tiny models whose losses differ, and texts to judge them by."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_dam.demo.training import train_tokenizer
from mergekit_dam.evaluation.settings import EvaluationSettings

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LENGTH = 16
SETTINGS = EvaluationSettings(sequence_length=LENGTH, sequences=5, batch_size=2)


def documents(count: int) -> list[str]:
    return [" ".join(WORDS[(i * j) % 10] for j in range(1, 12)) + f" {i}" for i in range(count)]


def save_model(folder: Path, *, seed: int, text: list[str] | None = None, **config: Any) -> str:
    tokenizer = train_tokenizer(text or documents(50), vocab_size=300)
    settings = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,  # far from uniform, or every model would have one loss
        **config,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_texts(folder: Path) -> list[Path]:
    jsonl = folder / "counting.test.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(40)))
    plain = folder / "prose.txt"
    plain.write_text("Ten nine eight, and so on.\n" * 40)
    return [jsonl, plain]
