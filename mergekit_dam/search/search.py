"""The search for the best coefficients: one trial after the other, each judged on held-out data.

1. Survey: every teacher and the model at the start run on the calibration data once.
2. Trials of the configured objective. First, a sweep of layer fits in the sensitivity metric.
   Next, a sweep in the plain metric, if the first was not asked for or did not improve the model.
   Then, where those left much to gain, descents of the end-to-end objective from the best so far:
   a short one, and a long one if the short one was worthwhile.
3. A trial is kept if the merged model as a whole comes nearer to its teachers on held-out data.

On held-out data the result is never worse than the start, or than a search with fewer trials.
"""

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Corrections
from mergekit_dam.coefficients.record import MergeRecord, Trial
from mergekit_dam.errors import DamError
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.backprop import run
from mergekit_dam.search.coordinates import Coordinate, coordinates_of
from mergekit_dam.search.descend import descend, judged_at_output
from mergekit_dam.search.gradient import Objective
from mergekit_dam.search.judge import Verdict
from mergekit_dam.search.regularisers import column_weights
from mergekit_dam.search.sensitivity import Sensitivity, gradient_tokens, sweep_back
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams import progress
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.stream import Stream

LOG = logging.getLogger(__name__)

DESCENTS = (20, 400)
"""Steps of each descent where no number is configured: the first shows whether it pays."""

SACRIFICE = 0.1
"""Rise of one model's KL that a trial after layer fits may cost, relative to the start's mean."""

CORRECTIONS = ".dam-corrections"
"""Beginning of the names of folders for a trial's corrections."""

ENOUGH = 0.05
"""Without a configured number of steps, there is no descent where layer fits left a smaller
fraction of the start's held-out KL than this: its steps cost more than such a rest is worth."""

WORTHWHILE = 0.05
"""A longer descent follows if the one before lowered the held-out KL by this fraction."""


def descents(asked: int | None) -> tuple[int, ...]:
    """Steps of the descents that may be run, one after the other.

    Args:
        asked: the number of steps that the configuration asks for, if it does.
    """
    return DESCENTS if asked is None else (asked,)


@dataclasses.dataclass
class Best:
    """The best coefficients so far, the verdict on them, and the trials."""

    record: MergeRecord
    verdict: Verdict
    trials: list[Trial]

    @property
    def left(self) -> float:
        """The fraction of the start's held-out KL that is left."""
        start = self.trials[0].mean_held_out_kl
        return self.verdict.mean / start if start else 0.0

    @property
    def allowance(self) -> float:
        """Rise of one model's KL that a trial may cost; only a start is not guarded."""
        return SACRIFICE * self.trials[0].mean_held_out_kl if self.improved else math.inf

    @property
    def improved(self) -> bool:
        """Whether something better than the start was found."""
        return any(trial.kept for trial in self.trials[1:])

    def consider(
        self,
        name: str,
        record: MergeRecord,
        verdict: Verdict,
        started: float,
        **details: float,
    ) -> None:
        """Record a trial, and keep its coefficients if the judge prefers them."""
        kept = verdict.better_than(self.verdict, self.allowance)
        seconds = time.perf_counter() - started
        self.trials.append(Trial(name, kept, verdict.losses, verdict.mean, seconds, details))
        lost = self.record if kept else record
        if kept:
            self.record, self.verdict = record, verdict
        if lost.corrections is not None and lost.corrections is not self.record.corrections:
            lost.corrections.discard()


@torch.no_grad()
def search(
    network: Network,
    streams: Sequence[Stream],
    settings: RunParameters,
    start: MergeRecord,
    *,
    scratch: Path,
) -> MergeRecord:
    """Find the coefficients of every tensor.

    Args:
        network: the stages of the model.
        streams: every model's calibration tokens, at the input of the model.
        settings: parameters of the merge.
        start: coefficients of every tensor to start from.
        scratch: a folder on a disk with room for the hidden states of every block.

    Returns:
        The best record, with the trials of the search.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dam-", dir=scratch) as folder:
        boundaries = BoundaryStates(Path(folder) / "entered")
        weighs_errors = settings.objective != "logits" and settings.metric == "sensitivity"
        best, data, moved = survey(network, streams, start, boundaries if weighs_errors else None)
        if weighs_errors:
            left = BoundaryStates(Path(folder) / "left")
            sensitivity = sweep_back(
                network, start, moved, entered=boundaries, left=left, seed=settings.random_seed
            )
            layer_trial(network, streams, best, data, sensitivity, scratch)
        if settings.objective != "logits" and not best.improved:
            layer_trial(network, streams, best, data, None, scratch)
        if settings.objective != "layer":
            logits_trial(network, settings, best, data, boundaries, kept=scratch)
    network.release()
    return dataclasses.replace(best.record, trials=best.trials)


def survey(
    network: Network,
    streams: Sequence[Stream],
    start: MergeRecord,
    boundaries: BoundaryStates | None,
) -> tuple[Best, list[Stream], list[Stream]]:
    """Run every teacher on its own data, and the model at the start on all data.

    Args:
        network: the stages of the model.
        streams: calibration tokens of every model.
        start: coefficients of the model at the start.
        boundaries: saves the inputs of the blocks for the tokens that metrics need.

    Returns:
        The start as the best so far; the data: tokens with the hidden states that leave the
        teachers' last blocks; the streams after the last block.
    """
    started = time.perf_counter()
    moving = [dataclasses.replace(stream) for stream in streams]
    for number, opened in network.forward():
        progress.show(f"start {opened.part.label}")
        if number > 0 and boundaries is not None:
            boundaries.put(number, [gradient_tokens(stream) for stream in moving])
        own = opened.merged_weights(start)
        for stream in moving:
            left = run(opened.part, own, stream.merged, network.device)
            stream.merged = stream.keep(_finite(left, opened))
            part = opened.teacher_part(stream.source)
            # Inline: a variable would keep these weights in memory after their stage.
            left = run(part, opened.teacher_weights(stream.source), stream.teacher, network.device)
            stream.teacher = stream.keep(_finite(left, opened))
    data = [
        dataclasses.replace(stream, teacher=moved.teacher)
        for stream, moved in zip(streams, moving, strict=True)
    ]
    verdict = judged_at_output(network, start, data, [stream.merged for stream in moving])
    if not math.isfinite(verdict.mean):
        raise _not_finite(network.output())
    seconds = time.perf_counter() - started
    trial = Trial("start", True, verdict.losses, verdict.mean, seconds)
    return Best(start, verdict, [trial]), data, moving


def _finite(leaving: Iterable[Tensor], opened: OpenStage) -> Iterator[Tensor]:
    for chunk in leaving:
        if not chunk.isfinite().all():
            raise _not_finite(opened)
        yield chunk


def _not_finite(opened: OpenStage) -> DamError:
    return DamError(
        f"{opened.part.label}: its output is not finite, because a model's weights, or its hidden "
        f"states on its calibration text, are not"
    )


def layer_trial(
    network: Network,
    streams: Sequence[Stream],
    best: Best,
    data: Sequence[Stream],
    sensitivity: Sensitivity | None,
    scratch: Path,
) -> None:
    """Try one sweep of layer fits on the merged stream, in a metric or the plain one."""
    started = time.perf_counter()
    moving = [dataclasses.replace(stream) for stream in streams]
    record = best.record.without(network.tensor_names)
    record.corrections = Corrections(scratch / f"{CORRECTIONS}-{len(best.trials)}")
    for number, opened in network.all():
        metrics = None
        if sensitivity is not None and opened.stage.kind == "block":
            metrics = partial(sensitivity.metrics, number, opened)
        fit_stage(opened, moving, record, metrics=metrics)
    verdict = judged_at_output(network, record, data, [stream.merged for stream in moving])
    name = "layer, identity" if sensitivity is None else "layer, sensitivity"
    best.consider(name, record, verdict, started)


def logits_trial(
    network: Network,
    settings: RunParameters,
    best: Best,
    data: Sequence[Stream],
    boundaries: BoundaryStates,
    *,
    kept: Path,
) -> None:
    """Descend the end-to-end objective from the best so far, as long as it is worthwhile."""
    if settings.objective != "logits" and settings.steps is None and best.left < ENOUGH:
        LOG.info("no descent: layer fits left %.0f %% of the start's KL", 100 * best.left)
        return
    coordinates, weights = _coordinates(network, settings, data)
    if not coordinates:
        return
    objective = Objective(network, coordinates, settings, boundaries)
    for number, steps in enumerate(descents(settings.steps)):
        started, before = time.perf_counter(), best.verdict.mean
        with tempfile.TemporaryDirectory(prefix=CORRECTIONS, dir=kept) as moving:
            ended = descend(
                objective,
                data,
                best.record,
                best.verdict,
                allowance=best.allowance,
                steps=steps,
                column_weights=weights,
                seed=settings.random_seed + number,
                moving=Path(moving),
                kept=kept,
                left=best.left,
            )
        name = f"logits, {steps} steps"
        best.consider(name, ended.record, ended.verdict, started, best_step=ended.steps)
        if best.verdict.mean > (1 - WORTHWHILE) * before:
            break


def _coordinates(
    network: Network, settings: RunParameters, data: Sequence[Stream]
) -> tuple[dict[str, Coordinate], dict[str, Tensor]]:
    """The fitted tensors of all stages, and their column weights where the overlap needs them."""
    found: dict[str, Coordinate] = {}
    weights: dict[str, Tensor] = {}
    head = network.stages[0].models.output.head_name
    for number, opened in network.all():
        last = number == len(network.stages) - 1
        like = data[0].merged[:1] if number == 0 else data[0].teacher[:1]
        anatomy = opened.anatomy(like.to(network.device))
        for coordinate in coordinates_of(opened, anatomy, head if last else None):
            found[coordinate.name] = coordinate
            if settings.weighted_overlap and coordinate.kind == "linear":
                weights[coordinate.name] = _column_weights(opened, coordinate)
    return found, weights


def _column_weights(opened: OpenStage, coordinate: Coordinate) -> Tensor:
    tensors, base = opened.by_name(coordinate.name).tensors, coordinate.form.base
    assert base is not None  # else the configuration was refused
    models = [tensors[source] for source in coordinate.form.merged]
    return column_weights(models, tensors[base], axis=coordinate.axis)
