"""The search for the best coefficients: one trial after the other, each judged on held-out data.

1. Survey: the model at the start runs on the sequences that judge it and those that give metrics.
   Every teacher runs once: in the first sweep of layer fits or, where there is none, in the survey.
2. Trials of the configured objective. First, a sweep of layer fits in the sensitivity metric.
   Next, a sweep in the plain metric, if the first was not asked for or did not improve the model.
   Then, where those left much to gain, descents of the end-to-end objective from the best so far:
   a short one, and a long one if the short one was worthwhile.
3. A trial is kept if the merged model as a whole comes nearer to its teachers on held-out data.

On held-out data the result is never worse than the start, or than a search with fewer trials.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mergekit_dam.coefficients.correction import Corrections
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.best import Best
from mergekit_dam.search.descents import CORRECTIONS, descents_from
from mergekit_dam.search.judge import judged_at_output, judged_by
from mergekit_dam.search.pace import Pace
from mergekit_dam.search.sensitivity import Sensitivity, sweep_back
from mergekit_dam.search.survey import judged_start, survey
from mergekit_dam.sources.network import Network
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.stream import Stream


@torch.no_grad()
def search(
    network: Network,
    streams: Sequence[Stream],
    settings: RunParameters,
    start: MergeRecord,
    *,
    scratch: Path,
    started: float | None = None,
) -> MergeRecord:
    """Find the coefficients of every tensor.

    Args:
        network: the stages of the model.
        streams: every model's calibration tokens, at the input of the model.
        settings: parameters of the merge.
        start: coefficients of every tensor to start from.
        scratch: a folder on a disk with room for the hidden states of every block.
        started: `time.perf_counter()` when the merge began, if not now.

    Returns:
        The best record, with the trials of the search.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    pace = Pace.of(settings, started)
    with tempfile.TemporaryDirectory(prefix=".dam-", dir=scratch) as folder:
        boundaries = BoundaryStates(Path(folder) / "entered")
        if settings.objective == "logits":
            surveyed = survey(network, streams, start, None, teachers=True)
            pace.surveyed(surveyed.seconds)
            best, data = judged_start(network, streams, surveyed, surveyed.taught)
            del surveyed
        else:
            best, data = layer_trials(
                network, streams, settings, start, pace, entered=boundaries, scratch=scratch
            )
        if settings.objective != "layer":
            descents_from(network, settings, best, data, boundaries, pace, kept=scratch)
    network.release()
    return dataclasses.replace(best.record, trials=best.trials, left_out=pace.left_out)


def layer_trials(
    network: Network,
    streams: Sequence[Stream],
    settings: RunParameters,
    start: MergeRecord,
    pace: Pace,
    *,
    entered: BoundaryStates,
    scratch: Path,
) -> tuple[Best, list[Stream]]:
    """Try one sweep of layer fits, and another in the plain metric if that was no good.

    Args:
        pace: what there is time for.
        entered: saves the inputs of the blocks for the tokens that metrics need.
        scratch: a folder on a disk with room for hidden states and corrections.

    Returns:
        The best so far, and the data of all that follows, as `judged_start` gives it.
    """
    weighs_errors = settings.metric == "sensitivity"
    boundaries = entered if weighs_errors else None
    surveyed = survey(network, streams, start, boundaries, teachers=False)
    pace.surveyed(surveyed.seconds)
    with tempfile.TemporaryDirectory(prefix=".dam-", dir=scratch) as folder:
        sensitivity = None
        if weighs_errors:
            sensitivity = sweep_back(
                network,
                start,
                surveyed.measuring,
                entered=entered,
                left=BoundaryStates(Path(folder)),
                seed=settings.random_seed,
            )
        swept = layer_sweep(network, streams, start, sensitivity, scratch)
    best, data = judged_start(network, streams, surveyed, swept.streams)
    del surveyed
    swept.consider(network, best, data)
    del swept
    if (
        weighs_errors
        and not best.improved
        and pace.allows("a sweep of layer fits in the plain metric", best.trials[-1].seconds)
    ):
        layer_sweep(network, streams, start, None, scratch).consider(network, best, data)
    return best, data


@dataclasses.dataclass(frozen=True)
class Swept:
    """A trial that was not judged yet.

    Attributes:
        record: what was fitted.
        streams: both streams of all data after the last block.
        started: `time.perf_counter()` when the trial began.
    """

    name: str
    record: MergeRecord
    streams: list[Stream]
    started: float

    def consider(self, network: Network, best: Best, data: Sequence[Stream]) -> None:
        """Judge the trial, and keep it if it is the best."""
        merged = [stream.merged for stream in judged_by(self.streams)]
        verdict = judged_at_output(network, self.record, judged_by(data), merged)
        best.consider(self.name, self.record, verdict, self.started)


def layer_sweep(
    network: Network,
    streams: Sequence[Stream],
    start: MergeRecord,
    sensitivity: Sensitivity | None,
    scratch: Path,
) -> Swept:
    """One sweep of layer fits on the merged stream, in a metric or the plain one."""
    started = time.perf_counter()
    metric = "identity" if sensitivity is None else "sensitivity"
    moving = [dataclasses.replace(stream) for stream in streams]
    record = start.without(network.tensor_names)
    record.corrections = Corrections(scratch / f"{CORRECTIONS}-{metric}")
    for number, opened in network.all():
        metrics = None
        if sensitivity is not None and opened.stage.kind == "block":
            metrics = partial(sensitivity.metrics, number, opened)
        fit_stage(opened, moving, record, metrics=metrics)
    return Swept(f"layer, {metric}", record, moving, started)
