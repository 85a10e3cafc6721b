"""The first sweep of a search: the start, and all teachers where nothing else runs them."""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from mergekit_dam.coefficients.record import MergeRecord, Trial
from mergekit_dam.journal import Journal
from mergekit_dam.search.backprop import not_finite, run
from mergekit_dam.search.best import TRIALS, Best
from mergekit_dam.search.judge import judged_at_output, judged_by
from mergekit_dam.search.sensitivity import measured_by
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams import progress
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream

SURVEY = "survey"
"""What the journal knows of a survey."""


@dataclasses.dataclass(frozen=True)
class Surveyed:
    """What the model at the start makes of the data that later steps ask for.

    Attributes:
        record: its coefficients.
        judging: the merged streams after the last block, for the sequences that judge a model.
        measuring: the same for the sequences that give metrics; empty where none are asked for.
        taught: the teachers' streams after the last block, of all sequences; empty where the
            teachers did not run.
        seconds: how long it took.
    """

    record: MergeRecord
    judging: list[Stream]
    measuring: list[Stream]
    taught: list[Stream]
    seconds: float

    def state(self, boundaries: BoundaryStates | None) -> dict[str, Any]:
        """All of it for the journal.

        Args:
            boundaries: the inputs of the blocks that were saved, if they were.
        """
        return {
            "judging": [stream.merged for stream in self.judging],
            "measuring": [stream.merged for stream in self.measuring],
            "taught": [stream.teacher for stream in self.taught],
            "seconds": self.seconds,
            "files": [] if boundaries is None else boundaries.files,
        }

    @classmethod
    def of_state(
        cls, state: Mapping[str, Any], streams: Sequence[Stream], start: MergeRecord
    ) -> "Surveyed":
        """What an earlier run made of the same calibration tokens."""
        judging = _merged(judged_by(streams), state["judging"])
        measuring = _merged(map(measured_by, streams), state["measuring"])
        taught = [
            dataclasses.replace(stream, teacher=stream.kept_again(x))
            for stream, x in zip(streams, state["taught"], strict=False)
        ]
        return cls(start, judging, measuring, taught, float(state["seconds"]))


def _merged(streams: Iterable[Stream], states: Iterable[Tensor]) -> list[Stream]:
    """Streams with other hidden states of the merged model; none where there are none."""
    pairs = zip(streams, states, strict=False)
    return [dataclasses.replace(stream, merged=stream.kept_again(x)) for stream, x in pairs]


def surveyed_once(
    network: Network,
    streams: Sequence[Stream],
    start: MergeRecord,
    boundaries: BoundaryStates | None,
    *,
    teachers: bool,
    journal: Journal,
) -> Surveyed:
    """`survey`, or what it gave in an earlier run."""
    state = journal.get(SURVEY)
    if state is not None:
        return Surveyed.of_state(state, streams, start)
    surveyed = survey(network, streams, start, boundaries, teachers=teachers)
    journal.put(SURVEY, surveyed.state(boundaries), said="the start was surveyed")
    return surveyed


def survey(
    network: Network,
    streams: Sequence[Stream],
    start: MergeRecord,
    boundaries: BoundaryStates | None,
    *,
    teachers: bool,
) -> Surveyed:
    """Run the model at the start on the sequences that judge it, and those that give metrics.

    Args:
        network: the stages of the model.
        streams: calibration tokens of every model.
        start: coefficients of the model at the start.
        boundaries: saves the inputs of the blocks for the tokens that metrics need.
        teachers: whether every teacher runs on its own data, too: on all of it.
    """
    started = time.perf_counter()
    judging = judged_by(streams)
    measuring = [] if boundaries is None else [measured_by(stream) for stream in streams]
    taught = [dataclasses.replace(stream) for stream in streams] if teachers else []
    progress.begin("survey")
    for number, opened in network.forward():
        progress.show(f"start {opened.part.label}", step=number)
        if number > 0 and boundaries is not None:
            boundaries.put(number, [stream.merged[:] for stream in measuring])
        own = opened.merged_weights(start)
        for stream in (*judging, *measuring):
            left = run(opened.part, own, stream.merged, network.device)
            stream.merged = stream.keep(_finite(left, opened))
        for stream in taught:
            part = opened.teacher_part(stream.source)
            # Inline: a variable would keep these weights in memory after their stage.
            left = run(part, opened.teacher_weights(stream.source), stream.teacher, network.device)
            stream.teacher = stream.keep(_finite(left, opened))
    return Surveyed(start, judging, measuring, taught, time.perf_counter() - started)


def taught_by(streams: Sequence[Stream], teachers: Iterable[Sequences]) -> list[Stream]:
    """Tokens with the hidden states that leave the teachers' last blocks.

    Args:
        streams: calibration tokens of every model.
        teachers: the hidden states.
    """
    pairs = zip(streams, teachers, strict=True)
    return [dataclasses.replace(stream, teacher=teacher) for stream, teacher in pairs]


def judged_start(
    network: Network,
    streams: Sequence[Stream],
    surveyed: Surveyed,
    taught: Sequence[Stream],
    journal: Journal,
) -> tuple[Best, list[Stream]]:
    """Judge the start, the first of all trials.

    Args:
        streams: calibration tokens of every model.
        surveyed: what the start made of the sequences that judge it.
        taught: streams whose teachers' side has left the last block.
        journal: keeps the best so far.

    Returns:
        The start as the best so far, and the data of all that follows: tokens with the hidden
        states that leave the teachers' last blocks.
    """
    started = time.perf_counter()
    data = taught_by(streams, [after.teacher for after in taught])
    merged = [stream.merged for stream in surveyed.judging]
    verdict = judged_at_output(network, surveyed.record, judged_by(data), merged, texts=True)
    if not math.isfinite(verdict.mean):
        raise not_finite(network.output())
    seconds = surveyed.seconds + time.perf_counter() - started
    trial = Trial(
        "start", True, verdict.losses, verdict.mean, seconds, text_losses=verdict.text_losses
    )
    progress.track(verdict.numbers, step=0, group=TRIALS)
    return Best(surveyed.record, verdict, [trial], journal), data


def _finite(leaving: Iterable[Tensor], opened: OpenStage) -> Iterator[Tensor]:
    for chunk in leaving:
        if not chunk.isfinite().all():
            raise not_finite(opened)
        yield chunk
