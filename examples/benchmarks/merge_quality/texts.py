"""The texts of a run: split, written, checked, and read as tokens."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from examples.benchmarks.measuring.models import Models
from examples.benchmarks.merge_quality import documents
from examples.benchmarks.merge_quality.documents import Sources, part_path
from examples.benchmarks.merge_quality.settings import JUDGED, Settings
from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.evaluation.texts import read_tokens


def prepare_texts(models: Models, sources: Mapping[str, Sources], settings: Settings) -> list[str]:
    """Split and write the texts, and check that they suffice.

    Returns:
        Sentences that describe the split.

    Raises:
        DamError: if a text is missing, cannot be read, or is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(models.any)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    parts, left_out = documents.make_parts(sources, settings.shares)
    folder = settings.out / "data"
    documents.write_parts(parts, folder)
    lines = documents.statement(documents.summarise(parts, left_out, count_tokens))
    vocab_size = _vocab_size(models)
    for domain, model in models.specialists.items():
        load_calibration(
            str(part_path(folder, domain, "calibration")),
            model=model,
            tokenizer=tokenizer,
            samples=settings.samples,
            sequence_length=settings.sequence_length,
            vocab_size=vocab_size,
            seed=settings.seed,
        )
    return lines


def tokens_by_part(models: Models, settings: Settings) -> dict[str, dict[str, torch.Tensor]]:
    """Validation and test text as tokens, by part and domain; they serve for all models."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(models.any)
    return {
        part: {
            domain: read_tokens(
                part_path(settings.out / "data", domain, part),
                tokenizer,
                replace(settings.evaluation, sequences=settings.sequences[part]),
                vocab_size=_vocab_size(models),
            )
            for domain in models.specialists
        }
        for part in JUDGED
    }


def count_sequences(tokens: Mapping[str, Mapping[str, torch.Tensor]], settings: Settings) -> str:
    """A sentence that says how many sequences of each part and domain there are."""
    counts = "; ".join(
        f"{part} " + ", ".join(f"{domain} {len(own)}" for domain, own in domains.items())
        for part, domains in tokens.items()
    )
    return f"Losses are measured on sequences of {settings.sequence_length} tokens: {counts}."


def _vocab_size(models: Models) -> int:
    return int(AutoConfig.from_pretrained(models.any).get_text_config().vocab_size)
