"""The fit of one stage: merges its tensors and runs the streams through it."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import FittedTensor, TensorReport, TensorSources
from mergekit_dam.errors import DamError, inside
from mergekit_dam.fitting.tensor_cores import tensor_cores
from mergekit_dam.layers.state import Metrics, Walk
from mergekit_dam.layers.walk import walk_part
from mergekit_dam.model.units import Anatomy
from mergekit_dam.sources.stage import OpenStage, Stage
from mergekit_dam.streams import progress
from mergekit_dam.streams.memory import give_back
from mergekit_dam.streams.outputs import OutputCache
from mergekit_dam.streams.stream import Stream

LOG = logging.getLogger(__name__)

BEFORE, GROUPS = 0.15, 0.75
"""Shares of the time of a block's fit, about: the teachers' runs before the first tensor is
settled, and the fits; then the merged streams advance."""

FindMetrics: TypeAlias = Callable[[Anatomy], Metrics]


@dataclass
class StageResult:
    """The streams and the record for the next stage, and the merged tensors to be written."""

    streams: list[Stream]
    record: MergeRecord
    merged: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def fit_stage(
    opened: OpenStage,
    streams: list[Stream],
    record: MergeRecord,
    *,
    metrics: FindMetrics | None = None,
) -> StageResult:
    """Fit the tensors of a stage and run the streams through it.

    Args:
        opened: the stage, with its tensors in memory.
        streams: one stream per model with calibration data; advanced in place.
        record: record of the merge; results are added in place.
        metrics: computes the metrics of the stage's linears; None measures plain errors.

    Raises:
        DamError: the fit failed; the message names the stage.
    """
    started = time.perf_counter()
    stage, merged = opened.stage, dict[str, Tensor]()
    with inside(stage.label):
        fitted = _fit(opened, streams, metrics)
    for tensor in fitted:
        record.add(tensor)
        merged[tensor.sources.name] = tensor.merged
    for spec in stage.tensors:
        if spec.tied_to is not None:
            tied = _tied(opened.sources_of(spec), spec.tied_to, record)
            record.add(tied)
            merged[spec.name] = tied.merged
    give_back()
    record.seconds[stage.label] = time.perf_counter() - started
    _say(stage, fitted, record.seconds[stage.label])
    return StageResult(streams, record, merged)


def _fit(
    opened: OpenStage, streams: Sequence[Stream], metrics: FindMetrics | None
) -> list[FittedTensor]:
    """Walk through the part; returns nothing if all of its tensors are tied to others."""
    if not opened.own:
        return []
    part = opened.part

    whole = sum(own.tensors[0].numel() for own in opened.own.values())
    settled = 0

    def on_settled(fitted: FittedTensor) -> None:
        nonlocal settled
        settled += fitted.merged.numel()
        report = fitted.report
        short = report.name.removeprefix(part.prefix)
        if report.held_out_start is not None and report.held_out_fitted is not None:
            short += f" {report.held_out_start:.3g} -> {report.held_out_fitted:.3g}"
        share = settled / whole
        if opened.stage.kind == "block":
            share = BEFORE + GROUPS * share
        progress.show(f"{part.label} {short}", share=share)

    progress.show(part.label, step=opened.stage.number)
    models = opened.stage.models
    weights = opened.starting_weights()
    device = opened.device
    like = streams[0].merged[:1].to(device)
    anatomy = models.examine(part, weights, like)
    walk = Walk(
        part,
        [opened.teacher_part(source) for source in range(len(models.sources))],
        opened.own,
        streams,
        anatomy,
        weights,
        on_settled,
        metrics={} if metrics is None else metrics(anatomy),
        head=models.output.head_name if opened.stage.kind == "output" else None,
        temperature=models.settings.temperature,
        teacher_outputs=OutputCache(streams[0].storage),
        merged_outputs=OutputCache(streams[0].storage),
    )
    try:
        with tensor_cores(models.settings.dtype_on(device) != torch.float32):
            return walk_part(walk, advance=opened.stage.kind != "output")
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise DamError(
            f"the fit has no solution ({error}); either `ridge` is too small, or a model's "
            f"weights, or its hidden states on its calibration text, are not finite"
        ) from error


def _say(stage: Stage, fitted: Sequence[FittedTensor], seconds: float) -> None:
    """Log and track how the fits of a stage went, by the mean of their held-out losses."""
    reports = [tensor.report for tensor in fitted]
    known = [
        (own.held_out_start, own.held_out_fitted)
        for own in reports
        if own.held_out_start is not None and own.held_out_fitted is not None
    ]
    said = f"{stage.label}: {len(known)} of {len(reports)} tensors fitted, {seconds:.1f} s"
    if known:
        before, after = (sum(losses) / len(known) for losses in zip(*known, strict=True))
        said += f", mean held-out loss {before:.4g} -> {after:.4g}"
        losses = {"held-out loss before": before, "held-out loss after": after}
        progress.track(losses, step=stage.number)
    LOG.info(said)


def _tied(sources: TensorSources, tied_to: str, record: MergeRecord) -> FittedTensor:
    """A tensor that is the same parameter as an earlier one: same coefficients, same bytes."""
    coefficients = record.coefficients[tied_to]
    report = TensorReport(sources.name, "head", f"tied to {tied_to}")
    return FittedTensor(sources, sources.merged(coefficients), coefficients, -1, report)
