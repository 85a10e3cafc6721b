"""Held-out cross-entropy of models on texts: the number by which merges are compared.

1. Read and pack the texts like calibration text, with each model's own tokenizer.
2. Run every model, one in memory at a time, over the same documents in the same order.
3. Report the mean over all predicted positions, in nats per token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from mergekit_dam.calibration.load import LOCAL_WINDOW, PIECE_SEQUENCES
from mergekit_dam.calibration.overlap import Sentences, warn_of_overlap
from mergekit_dam.calibration.packing import pack
from mergekit_dam.calibration.pieces import Intake, shuffled_pieces
from mergekit_dam.calibration.reading import open_source
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.errors import DamError, first_line
from mergekit_dam.model.whole import not_loaded, require_finite_loss, require_model, whole_model
from mergekit_dam.tables import aligned
from mergekit_dam.threads import use_own_share

LOG = logging.getLogger(__name__)

LOGITS_AT_ONCE = 2**28  # elements: 1 GiB in fp32
_ORDER_SEED = 0  # the order of the documents is part of the measurement, so it is no option


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How models are evaluated.

    Attributes:
        sequence_length: Tokens per sequence; the first one is not predicted.
        sequences: Largest number of sequences per text; a shorter text is used as a whole.
        batch_size: Sequences per forward pass; fewer if the logits would be too large.
        device: Device on which the models run, such as `cpu` or `cuda:0`.
        dtype: Dtype in which weights are loaded: `float32`, `bfloat16`, `float16`, or `auto` for
            the dtype in which they are stored.
    """

    sequence_length: int = 256
    sequences: int = 24
    batch_size: int = 4
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        settings: Settings of the evaluation.
        models: Names of the models, in the order given.
        texts: Column name -> path, in the order given.
        sequences: Number of sequences that were used, per model and text.
        losses: Cross-entropy in nats per token, per model and text.
    """

    settings: EvaluationSettings
    models: tuple[str, ...]
    texts: dict[str, Path]
    sequences: dict[str, dict[str, int]]
    losses: dict[str, dict[str, float]]

    def mean(self, model: str) -> float:
        """Mean loss over the texts, with equal weights."""
        return sum(self.losses[model].values()) / len(self.losses[model])

    def table(self) -> str:
        """The losses as a table: one row per model, one column per text."""
        rows = [(model, [*self.losses[model].values(), self.mean(model)]) for model in self.models]
        return format_table(["nats per token", *self.texts, "mean"], rows)

    def to_json(self) -> dict[str, Any]:
        """Everything, as values that can be written as JSON."""
        return {
            "settings": asdict(self.settings),
            "texts": {name: str(path) for name, path in self.texts.items()},
            "models": [
                {
                    "model": model,
                    "loss": self.losses[model],
                    "mean": self.mean(model),
                    "sequences": self.sequences[model],
                }
                for model in self.models
            ],
        }


def evaluate(
    models: Sequence[str], files: Sequence[Path], settings: EvaluationSettings
) -> Evaluation:
    """Measure the cross-entropy of every model on every text.

    Args:
        models: Folders or Hub ids of causal language models that have a tokenizer.
        files: Files or folders of text, as for `calibration`.
        settings: Settings of the evaluation.

    Raises:
        DamError: If a text or model is missing or cannot be read, or if a text is too short.
    """
    use_own_share()
    texts = name_texts(files)
    models = tuple(dict.fromkeys(models))
    for model in models:
        require_model(model)
    _require_device(settings.device)
    read = {model: _all_tokens(model, texts, settings) for model in models}
    _warn_of_different_tokens({model: words for model, (_, words) in read.items()})
    tokens = {model: ids for model, (ids, _) in read.items()}
    losses: dict[str, dict[str, float]] = {}
    total = sum(len(sequences) for own in tokens.values() for sequences in own.values())
    with tqdm(total=total, desc="Evaluate", unit="sequence") as progress:
        for model in models:
            progress.set_postfix_str(Path(model).name)
            loaded = load_model(model, settings)
            losses[model] = {}
            for name, sequences in tokens[model].items():
                loss = cross_entropy(
                    loaded, sequences, batch_size=settings.batch_size, progress=progress
                )
                require_finite_loss(loss, loaded, model=model, text=name)
                losses[model][name] = loss
            del loaded  # before the next is loaded
    counts = {model: {name: len(x) for name, x in own.items()} for model, own in tokens.items()}
    return Evaluation(settings, models, texts, counts, losses)


def cross_entropy(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    batch_size: int,
    progress: tqdm[NoReturn] | None = None,
) -> float:
    """Mean of -log p(token | tokens before it) over all predicted positions, in nats.

    Args:
        tokens: int64 `[sequences, sequence_length]`; all positions but the first are predicted.
        batch_size: Sequences per forward pass; lowered until their logits have at most
            `LOGITS_AT_ONCE` elements, though never below one sequence.
        progress: Bar that is updated by the number of sequences done.
    """
    sequences, length = tokens.shape
    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, min(batch_size, LOGITS_AT_ONCE // (length * vocabulary)))
    total = 0.0
    with torch.inference_mode():
        for batch in torch.split(tokens.to(model.device), rows):
            logits = model(input_ids=batch, use_cache=False).logits
            for row, targets in zip(logits, batch, strict=True):
                # Only one sequence's logits are copied to fp32 at a time; the sum is in fp64.
                losses = functional.cross_entropy(row[:-1].float(), targets[1:], reduction="none")
                total += losses.double().sum().item()
            if progress is not None:
                progress.update(len(batch))
    return total / (sequences * (length - 1))


def read_tokens(
    path: Path,
    tokenizer: Tokenizer,
    settings: EvaluationSettings,
    *,
    vocab_size: int,
    sentences: Sentences | None = None,
) -> torch.Tensor:
    """The first sequences of a text as packed ids: int64 `[sequences, sequence_length]`.

    The order of the documents depends on the text alone. `sentences` collects what was read.
    """
    source = CalibrationSource.parse(str(path))
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
        sequences=settings.sequences,
        sequence_length=settings.sequence_length,
        vocab_size=vocab_size,
    )
    if not len(packed.tokens):
        raise DamError(
            f"{path} holds {packed.tokenised} tokens, which are less than one sequence of "
            f"{settings.sequence_length}: add text, or pass a smaller --sequence-length"
        )
    return packed.tokens


def load_model(name: str, settings: EvaluationSettings) -> PreTrainedModel:
    """Load a model for evaluation, on its device.

    Raises:
        DamError: If it cannot be loaded, or a weight is missing.
    """
    transformers_logging.disable_progress_bar()  # `evaluate` has a bar of its own
    model = whole_model(name, settings.dtype)
    torch.nn.Module.to(model.eval(), settings.device)  # in place; transformers' `to` is untyped
    return model


def name_texts(files: Sequence[Path]) -> dict[str, Path]:
    """Short names of text files: the stem, or the path if the stem is not unique."""
    stems = [path.stem for path in files]
    return {path.stem if stems.count(path.stem) == 1 else path.as_posix(): path for path in files}


def format_table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Lay out losses for a terminal: names on the left, numbers with three decimals aligned."""
    # -0.0 + 0.0 is 0.0, so that no -0.000 is printed.
    cells = [[name, *(f"{round(value, 3) + 0.0:.3f}" for value in row)] for name, row in rows]
    return aligned(header, cells)


def _require_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = first_line(error)
        raise DamError(f"the device {name!r} cannot be used: {reason}") from error


_Ids = dict[str, torch.Tensor]
_Words = dict[str, list[str]]


def _all_tokens(
    model: str, texts: dict[str, Path], settings: EvaluationSettings
) -> tuple[_Ids, _Words]:
    """Every text as a model's ids, and as the tokens that these ids stand for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        vocab_size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    except Exception as error:  # OSError, ValueError, KeyError, ImportError
        raise not_loaded("tokenizer", model, error) from error
    ids = {}
    for name, path in texts.items():
        read = Sentences()
        ids[name] = read_tokens(path, tokenizer, settings, vocab_size=vocab_size, sentences=read)
        warn_of_overlap(Path(model) / REPORT_NAME, name, read)
    words = {
        name: list(tokenizer.convert_ids_to_tokens(own.flatten().tolist()))
        for name, own in ids.items()
    }
    return ids, words


def _warn_of_different_tokens(words: dict[str, _Words]) -> None:
    """Warn where models split the text differently; equal tokens under other ids are fine."""
    first, *others = words
    different = [model for model in others if words[model] != words[first]]
    if different:
        LOG.warning(
            "%s: the tokenizer differs from that of %s; losses per token cannot be compared "
            "between different tokenizers",
            ", ".join(different),
            first,
        )
