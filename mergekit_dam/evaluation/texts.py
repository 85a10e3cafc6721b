"""Texts -> tokens: read and packed like calibration text, with each model's own tokenizer."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from mergekit_dam.calibration.load import LOCAL_WINDOW, PIECE_SEQUENCES
from mergekit_dam.calibration.overlap import Sentences, warn_of_overlap
from mergekit_dam.calibration.packing import pack
from mergekit_dam.calibration.pieces import Intake, shuffled_pieces
from mergekit_dam.calibration.reading import open_source
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.errors import DamError, inside
from mergekit_dam.evaluation.named import text_source
from mergekit_dam.evaluation.settings import EvaluationSettings

LOG = logging.getLogger(__name__)

_ORDER_SEED = 0  # the order of the documents is part of the measurement, so it is no option


@dataclass(frozen=True)
class Sequences:
    """The sequences of a text, or of several.

    Attributes:
        tokens: int64 `[sequences, sequence_length]`.
        counted: Which of the tokens behind the first ones count in the loss, bool
            `[sequences, sequence_length - 1]`; at least one of every sequence.
    """

    tokens: torch.Tensor
    counted: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def joined(cls, every: Iterable["Sequences"]) -> "Sequences":
        """All sequences of several texts, in one length."""
        texts = list(every)
        return cls(torch.cat([t.tokens for t in texts]), torch.cat([t.counted for t in texts]))


Ids = dict[str, Sequences]
"""Text's name -> its sequences."""


def read_tokens(
    text: CalibrationSource | str | Path,
    tokenizer: Tokenizer,
    settings: EvaluationSettings,
    *,
    vocab_size: int,
) -> torch.Tensor:
    """The first sequences of a text as packed ids: int64 `[sequences, sequence_length]`.

    Raises:
        DamError: If the text cannot be read, or is shorter than one sequence.
    """
    return read_sequences(text, tokenizer, settings, vocab_size=vocab_size).tokens


def read_sequences(
    text: CalibrationSource | str | Path,
    tokenizer: Tokenizer,
    settings: EvaluationSettings,
    *,
    vocab_size: int,
    sentences: Sentences | None = None,
) -> Sequences:
    """The first sequences of a text, without those in which no token counts.

    The order of the documents depends on the text alone. `sentences` collects what was read.

    Raises:
        DamError: If the text cannot be read, or is shorter than one sequence.
    """
    source = text if isinstance(text, CalibrationSource) else text_source(str(text))
    reading = open_source(source, tokenizer=tokenizer, model="the model", seed=_ORDER_SEED)
    pieces = shuffled_pieces(
        reading.documents,
        window=LOCAL_WINDOW,
        piece_tokens=PIECE_SEQUENCES * settings.sequence_length,
        seed=_ORDER_SEED,
        intake=Intake(),
    )
    packed = pack(
        (sentences or Sentences()).of(pieces),
        tokenizer=tokenizer,
        sequences=source.samples or settings.sequences,
        sequence_length=settings.sequence_length,
        vocab_size=vocab_size,
    )
    if not len(packed.tokens):
        raise DamError(
            f"{source.text} holds {packed.tokenised} tokens, which are less than one sequence of "
            f"{settings.sequence_length}: add text, or pass a smaller --sequence-length"
        )
    if packed.counted is None:
        return Sequences(packed.tokens, torch.ones_like(packed.tokens[:, 1:]).bool())
    counted = packed.counted[:, :-1]
    kept = counted.any(1)
    if not kept.any():
        raise DamError(
            f"{source.text}: no token counts with `loss_on={source.loss_on}`, as there is no turn "
            f"of an assistant in what was read; remove `loss_on`, or name text with answers"
        )
    return Sequences(packed.tokens[kept], counted[kept])


def tokens_of(
    model: str,
    texts: Mapping[str, CalibrationSource],
    settings: EvaluationSettings,
    *,
    tokenizer: Tokenizer,
    vocab_size: int,
) -> tuple[Ids, dict[str, list[str]]]:
    """Every text as a model's ids, and as the tokens that these ids stand for.

    Warns of text that took part in the merge that made the model.

    Args:
        model: Folder or name of the model, for messages and to find its report.
    """
    ids = {}
    for name, source in texts.items():
        read = Sentences()
        with inside(f"{name}, for {model}"):
            ids[name] = read_sequences(
                source, tokenizer, settings, vocab_size=vocab_size, sentences=read
            )
        warn_of_overlap(Path(model) / REPORT_NAME, name, read)
    words = {
        name: list(tokenizer.convert_ids_to_tokens(own.tokens.flatten().tolist()))
        for name, own in ids.items()
    }
    return ids, words


def unlike(words: Mapping[str, Mapping[str, list[str]]]) -> frozenset[str]:
    """Texts that models split differently, with a warning; equal tokens under other ids are fine.

    Args:
        words: Model -> text -> tokens.
    """
    seen: dict[str, tuple[str, list[str]]] = {}
    different: dict[tuple[str, str], list[str]] = {}
    for model, own in words.items():
        for text, tokens in own.items():
            first, expected = seen.setdefault(text, (model, tokens))
            if tokens != expected:
                different.setdefault((model, first), []).append(text)
    for (model, first), _ in different.items():
        LOG.warning(
            "%s: the tokenizer differs from that of %s; losses per token cannot be compared "
            "between different tokenizers",
            model,
            first,
        )
    return frozenset(text for texts in different.values() for text in texts)
