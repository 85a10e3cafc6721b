"""The search for the best coefficients: one trial after the other, each judged on held-out data.

1. Survey: the model at the start runs on the sequences that judge it and those that give metrics.
   Every teacher runs once: in the first sweep of layer fits or, where there is none, in the survey.
2. Trials of the configured objective. First, a sweep of layer fits in the sensitivity metric.
   Next, a sweep in the plain metric, if the first was not asked for or did not improve the model.
   Then, where those left much to gain, descents of the end-to-end objective from the best so far:
   a short one, and a long one if the short one was worthwhile.
3. A trial is kept if the merged model as a whole comes nearer to its teachers on held-out data.

On held-out data the result is never worse than the start, or than a search with fewer trials.

What is finished is kept in a journal, from which a next run goes on: the survey, the backward
sweep, boundaries of layer sweeps, the best so far after every trial, and descents on their way.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import torch

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.journal import Journal
from mergekit_dam.layers.sweep import Sweep, boundary, kept_teachers
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.best import Best
from mergekit_dam.search.descents import descents_from
from mergekit_dam.search.judge import judged_at_output, judged_by
from mergekit_dam.search.pace import Pace
from mergekit_dam.search.sensitivity import GRADIENTS, Sensitivity, swept_back_once
from mergekit_dam.search.survey import SURVEY, judged_start, surveyed_once, taught_by
from mergekit_dam.sources.network import Network
from mergekit_dam.streams import progress
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.stream import Stream


@torch.no_grad()
def search(
    network: Network,
    streams: Sequence[Stream],
    settings: RunParameters,
    start: MergeRecord,
    *,
    journal: Journal,
    started: float | None = None,
) -> MergeRecord:
    """Find the coefficients of every tensor.

    Args:
        network: the stages of the model.
        streams: every model's calibration tokens, at the input of the model.
        settings: parameters of the merge.
        start: coefficients of every tensor to start from.
        journal: what is kept, in a folder with room for the hidden states of every block.
        started: `time.perf_counter()` when the merge began, if not now.

    Returns:
        The best record, with the trials of the search.
    """
    pace = Pace.of(settings, started)
    with journal.room("entered") as folder:
        boundaries = BoundaryStates(folder)
        make = start_alone if settings.objective == "logits" else layer_trials
        best, data = make(network, streams, settings, start, pace, boundaries, journal)
        if settings.objective != "layer":
            descents_from(network, settings, best, data, boundaries, pace, journal)
    network.release()
    return dataclasses.replace(best.record, trials=best.trials, left_out=pace.left_out)


def start_alone(
    network: Network,
    streams: Sequence[Stream],
    settings: RunParameters,
    start: MergeRecord,
    pace: Pace,
    entered: BoundaryStates,
    journal: Journal,
) -> tuple[Best, list[Stream]]:
    """Judge the start, where no layer fits follow.

    Returns:
        The start as the best so far, and the data of all that follows, as `judged_start` gives it.
    """
    surveyed = surveyed_once(network, streams, start, None, teachers=True, journal=journal)
    pace.surveyed(surveyed.seconds)
    best = Best.kept(journal)
    if best is not None:
        return best, taught_by(streams, [own.teacher for own in surveyed.taught])
    best, data = judged_start(network, streams, surveyed, surveyed.taught, journal)
    best.keep()
    return best, data


def layer_trials(
    network: Network,
    streams: Sequence[Stream],
    settings: RunParameters,
    start: MergeRecord,
    pace: Pace,
    entered: BoundaryStates,
    journal: Journal,
) -> tuple[Best, list[Stream]]:
    """Try one sweep of layer fits, and another in the plain metric if that was no good.

    Args:
        pace: what there is time for.
        entered: saves the inputs of the blocks for the tokens that metrics need.
        journal: what is kept.

    Returns:
        The best so far, and the data of all that follows, as `judged_start` gives it.
    """
    stages, plain = len(network.stages), sweep_name("identity")
    best, swept = Best.kept(journal), journal.get(boundary(sweep_name(settings.metric), stages))
    if best is None or swept is None:
        best, data = first_trial(network, streams, settings, start, pace, entered, journal)
    else:
        pace.surveyed(best.trials[0].seconds)
        data = taught_by(streams, kept_teachers(streams, swept))
    if (
        settings.metric == "sensitivity"
        and len(best.trials) == 2
        and not best.improved
        and pace.allows("a sweep of layer fits in the plain metric", best.trials[-1].seconds)
    ):
        layer_sweep(network, streams, start, None, journal).consider(network, best, data)
        journal.drop(plain, boundary(plain, stages))
    return best, data


def first_trial(
    network: Network,
    streams: Sequence[Stream],
    settings: RunParameters,
    start: MergeRecord,
    pace: Pace,
    entered: BoundaryStates,
    journal: Journal,
) -> tuple[Best, list[Stream]]:
    """Judge the start, and a sweep of layer fits in the configured metric; as `layer_trials`."""
    weighs_errors = settings.metric == "sensitivity"
    boundaries = entered if weighs_errors else None
    surveyed = surveyed_once(network, streams, start, boundaries, teachers=False, journal=journal)
    pace.surveyed(surveyed.seconds)
    with journal.room("left") as folder:
        sensitivity = None
        if weighs_errors:
            left, seed = BoundaryStates(folder), settings.random_seed
            sensitivity = swept_back_once(
                network, start, surveyed.measuring, entered, left, seed, journal
            )
        swept = layer_sweep(network, streams, start, sensitivity, journal)
        best, data = judged_start(network, streams, surveyed, swept.streams, journal)
        del surveyed
        swept.consider(network, best, data)
    journal.drop(SURVEY, GRADIENTS, sweep_name(settings.metric))  # but not the teachers' streams
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
    journal: Journal,
) -> Swept:
    """One sweep of layer fits on the merged stream, in a metric or the plain one."""
    started = time.perf_counter()
    metric = "identity" if sensitivity is None else "sensitivity"
    known = start.without(network.tensor_names)
    sweep = Sweep(journal, sweep_name(metric), len(network.stages), lambda: streams, known)
    progress.begin(phase_name(metric), done=sweep.done)
    for number, opened in network.all(sweep.done):
        metrics = None
        if sensitivity is not None and opened.stage.kind == "block":
            metrics = partial(sensitivity.metrics, number, opened)
        sweep.fit(number, opened, metrics=metrics)
    return Swept(f"layer, {metric}", sweep.record, sweep.streams, started)


def phase_name(metric: str) -> str:
    """Name of a sweep of layer fits among the phases of a merge."""
    return "layer fits" if metric == "sensitivity" else "layer fits, plain metric"


def sweep_name(metric: str) -> str:
    """Name of a sweep of layer fits in the journal."""
    return f"layer-{metric}"
