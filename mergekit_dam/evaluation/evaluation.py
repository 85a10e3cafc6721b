"""An evaluation: every model on every text, compared with a baseline and with specialists.

1. Read and pack the texts like calibration text, with each model's own tokenizer.
2. Run every model over the same sequences in the same order, one part of one model at a time.
3. Take means over sequences, and differences sequence by sequence.
"""

import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.errors import ArchitectureError, DamError, first_line
from mergekit_dam.evaluation.losses import Measured, average_of, mean, recovery
from mergekit_dam.evaluation.named import named_texts
from mergekit_dam.evaluation.pace import Pace
from mergekit_dam.evaluation.parts import PartedModel, in_parts, losses_in_parts
from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.evaluation.sources import Judged, judged_models
from mergekit_dam.evaluation.texts import Ids, Sequences, tokens_of, unlike
from mergekit_dam.evaluation.whole import load_model, losses_of_whole
from mergekit_dam.threads import use_own_share

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        settings: Settings of the evaluation.
        models: Names of the models, in the order given.
        texts: Text's name -> where it is, in the order given.
        each: Model -> text -> loss of every sequence in nats per token, fp64 `[sequences]`. Of a
            specialist that is no model itself, its own text alone.
        baseline: The model that others are compared with.
        references: Text's name -> the specialist of that text.
        unlike: Texts that models read in different tokens: nothing is compared on them.
    """

    settings: EvaluationSettings
    models: tuple[str, ...]
    texts: dict[str, str]
    each: Mapping[str, Mapping[str, Tensor]]
    baseline: str | None = None
    references: Mapping[str, str] = field(default_factory=dict)
    unlike: frozenset[str] = frozenset()

    @property
    def losses(self) -> dict[str, dict[str, float]]:
        """Cross-entropy in nats per token, per model and text."""
        return {m: {t: mean(x).value for t, x in own.items()} for m, own in self.each.items()}

    @property
    def sequences(self) -> dict[str, dict[str, int]]:
        """Number of sequences that were used, per model and text."""
        return {m: {t: len(x) for t, x in own.items()} for m, own in self.each.items()}

    def loss(self, model: str) -> dict[str, Measured | None]:
        """A model's loss by text; the mean over the texts comes last."""
        return self._with_mean({text: mean(self.each[model][text]) for text in self.texts})

    def difference(self, model: str) -> dict[str, Measured | None]:
        """A model's loss minus that of the baseline, sequence by sequence."""
        assert self.baseline is not None
        base = self.each[self.baseline]
        own = self.each[model]
        return self._with_mean(
            {t: None if t in self.unlike else mean(own[t] - base[t]) for t in self.texts}
        )

    def recovery(self, model: str) -> dict[str, Measured | None]:
        """The share of each specialist's advantage over the baseline that a model wins back."""
        assert self.baseline is not None
        found = {}
        for text, specialist in self.references.items():
            three = (self.each[name][text] for name in (model, self.baseline, specialist))
            found[text] = None if text in self.unlike else recovery(*three)
        return self._with_mean(found)

    def mean(self, model: str) -> float:
        """Mean loss over the texts, with equal weights."""
        return sum(self.losses[model].values()) / len(self.losses[model])

    @staticmethod
    def _with_mean(found: dict[str, Measured | None]) -> dict[str, Measured | None]:
        return {**found, "mean": average_of(found.values())}


def evaluate(
    models: Sequence[str] | Mapping[str, str],
    texts: Sequence[str | Path] | Mapping[str, CalibrationSource],
    settings: EvaluationSettings,
    *,
    baseline: str | None = None,
    references: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Measure the cross-entropy of every model on every text.

    Args:
        models: Folders, Hub ids or BASE+ADAPTER of causal language models that have a tokenizer;
            with names, a mapping from these.
        texts: Files or folders of text, as for `calibration`; or texts by name.
        settings: Settings of the evaluation.
        baseline: One of the names of `models`.
        references: Text's name -> the specialist of that text, a name of `models` or a model.
        say: Prints a line on progress.

    Raises:
        DamError: If a text or model is missing or cannot be read, or if a text is too short.
    """
    use_own_share()
    named = dict(models) if isinstance(models, Mapping) else {name: name for name in models}
    by_name = dict(texts) if isinstance(texts, Mapping) else named_texts(texts)
    references = dict(references or {})
    wanted = {name: tuple(by_name) for name in named}
    for text, name in references.items():
        wanted[name] = tuple(dict.fromkeys((*wanted.get(name, ()), text)))
        named.setdefault(name, name)
    _require_device(settings.device)
    with judged_models(named.values(), settings.trust_remote_code) as found:
        judged = {name: found[model] for name, model in named.items()}
        tokens, different = _tokens(judged, by_name, wanted, settings)
        each = _losses(judged, tokens, settings, Pace(say))
    shown = tuple(models)
    places = {name: source.text for name, source in by_name.items()}
    return Evaluation(settings, shown, places, each, baseline, references, different)


def _tokens(
    judged: Mapping[str, Judged],
    texts: Mapping[str, CalibrationSource],
    wanted: Mapping[str, Sequence[str]],
    settings: EvaluationSettings,
) -> tuple[dict[str, Ids], frozenset[str]]:
    """Every model's ids of the texts that it is judged by, and texts that models read unlike."""
    read = {
        name: tokens_of(
            model.name,
            {text: texts[text] for text in wanted[name]},
            settings,
            tokenizer=model.tokenizer,
            vocab_size=model.vocab_size,
        )
        for name, model in judged.items()
    }
    different = unlike({name: words for name, (_, words) in read.items()})
    return {name: ids for name, (ids, _) in read.items()}, different


def _losses(
    judged: Mapping[str, Judged],
    tokens: Mapping[str, Ids],
    settings: EvaluationSettings,
    pace: Pace,
) -> dict[str, dict[str, Tensor]]:
    """Losses of every sequence, by model and text; each model is checked before any runs."""
    ready = {name: _prepared(model, settings) for name, model in judged.items()}
    counts = {name: sum(map(len, own.values())) for name, own in tokens.items()}
    known = [own.whole_cost for own in ready.values() if isinstance(own, PartedModel)]
    usual = max(known, default=1)
    costs = {n: r.whole_cost if isinstance(r, PartedModel) else usual for n, r in ready.items()}
    pace.total = sum(counts[name] * costs[name] for name in ready)
    pace.starts()
    found = {}
    for name, own in ready.items():
        joined = Sequences.joined(tokens[name].values())
        if isinstance(own, PartedModel):
            losses = losses_in_parts(own, joined, settings, pace.done)
        else:
            losses = _in_memory(own, joined, settings, pace, costs[name])
        _require_finite(losses, judged[name].name)
        sizes = [len(ids) for ids in tokens[name].values()]
        found[name] = dict(zip(tokens[name], torch.split(losses, sizes), strict=True))
        gc.collect()
    return found


def _prepared(model: Judged, settings: EvaluationSettings) -> PartedModel | Judged:
    """A model in parts; itself where it has to be loaded as a whole."""
    try:
        return in_parts(model, settings)
    except ArchitectureError as error:
        LOG.info("%s is loaded as a whole: %s", model.name, first_line(error))
        return model


def _in_memory(
    model: Judged, text: Sequences, settings: EvaluationSettings, pace: Pace, cost: int
) -> Tensor:
    loaded = load_model(model.folder(), settings)
    return losses_of_whole(
        loaded,
        text.tokens,
        counted=text.counted,
        batch_size=settings.batch_size,
        done=lambda sequences: pace.done(cost * sequences),
    )


def _require_finite(losses: Tensor, model: str) -> None:
    if not math.isfinite(losses.sum().item()):
        raise DamError(
            f"the loss of {model} is no number, although its weights are finite, so a sum "
            f"overflows: pass `--dtype float32`"
        )


def _require_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = first_line(error)
        raise DamError(f"the device {name!r} cannot be used: {reason}") from error
