"""A sweep of layer fits, which goes on behind the last boundary that its journal has kept."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mergekit_dam.coefficients.correction import Corrections
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.journal import Journal
from mergekit_dam.layers.fit import FindMetrics, StageResult, fit_stage
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream

CORRECTIONS = "corrections"
"""Beginning of the names of folders for corrections."""


class Sweep:
    """The fits of all stages in order, and how far they are.

    What is kept at a boundary is the record so far, and both streams there.

    Args:
        journal: keeps boundaries.
        name: name of the sweep in the journal.
        stages: number of stages.
        streams: makes the streams at the model's input, one per model with calibration data.
        record: what is known before the sweep; results are added in place.
    """

    def __init__(
        self,
        journal: Journal,
        name: str,
        stages: int,
        streams: Callable[[], Sequence[Stream]],
        record: MergeRecord,
    ) -> None:
        self.record, self._streams = record, streams
        self.streams: list[Stream] = []
        self._journal, self._name, self._stages = journal, name, stages
        self._done: int | None = None
        self._kept = 0

    @property
    def done(self) -> int:
        """Number of stages whose fits are known; asking for it begins the sweep."""
        if self._done is None:
            self._done = self._kept = self._begin()
        return self._done

    def _begin(self) -> int:
        self.streams = [dataclasses.replace(stream) for stream in self._streams()]
        folder = self._journal.path(f"{CORRECTIONS}-{self._name}")
        state = self._journal.get(self._name)
        there = None if state is None else self._journal.get(boundary(self._name, state["done"]))
        known = None if there is None else state["record"]["corrections"]
        corrections = Corrections(folder, remove=self._journal.remove, state=known)
        if there is None:
            self.record.corrections = corrections
            return 0
        self.record = MergeRecord.of_state(state["record"], corrections)
        sides = zip(self.streams, there["teacher"], there["merged"], strict=True)
        for stream, teacher, merged in sides:
            # Both before either: chunks go by the length of the teacher's side.
            stream.teacher, stream.merged = stream.kept_again(teacher), stream.kept_again(merged)
        return int(state["done"])

    def _keep(self, done: int, before: int) -> None:
        """Keep a boundary, in place of the one before: streams first, which the record names."""
        streams = {
            "teacher": [stream.teacher for stream in self.streams],
            "merged": [stream.merged for stream in self.streams],
        }
        blocks, every = min(done - 1, self._stages - 2), self._stages - 2
        said = f"{blocks} of {every} blocks were fitted" if blocks else "the input was fitted"
        self._journal.put(boundary(self._name, done), streams)
        self._journal.put(self._name, {"done": done, "record": self.record.state}, said=said)
        self._journal.drop(boundary(self._name, before))

    def fit(
        self, number: int, opened: OpenStage, *, metrics: FindMetrics | None = None
    ) -> StageResult:
        """The fit of the next stage, or that of an earlier run, whose weights are merged again.

        Args:
            number: number of the stage.
            opened: the stage, with its tensors in memory.
            metrics: computes the metrics of the stage's linears; None measures plain errors.
        """
        if number < self.done:
            return StageResult(self.streams, self.record, merged_again(opened, self.record))
        result = fit_stage(opened, self.streams, self.record, metrics=metrics)
        self._done = number + 1
        if self._done == self._stages or self._journal.due():
            self._keep(self._done, self._kept)
            self._kept = self._done
        return result


def boundary(name: str, done: int) -> str:
    """Name of the streams in the journal, behind some stages of a sweep."""
    return f"{name}-{done:05d}"


def merged_again(opened: OpenStage, record: MergeRecord) -> dict[str, Tensor]:
    """The merged tensors of a stage by name, in the dtypes in which they are written."""
    return {
        spec.name: opened.sources_of(spec).merged(
            record.coefficients[spec.name],
            axis=record.axes.get(spec.name, -1),
            correction=record.correction(spec.name),
        )
        for spec in opened.stage.tensors
    }


def kept_teachers(streams: Sequence[Stream], state: Mapping[str, Any]) -> list[Sequences]:
    """The teachers' hidden states at the boundary that the journal has kept of a sweep.

    Args:
        streams: the streams at the model's input.
        state: what the journal has there.
    """
    return [own.kept_again(x) for own, x in zip(streams, state["teacher"], strict=True)]
