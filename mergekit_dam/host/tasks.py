"""The tasks that mergekit's executor runs for a dam merge.

    one sweep:
    loads -> gathers -> FitStage (input) -> FitStage (block 0) -> ... -> FitStage (output)
                           |                  |                            |
                        MergedTensor ...   MergedTensor ...            WriteArtifacts
    a search:
    Search -> WriteArtifacts
       |
    loads -> gathers -> MergeKnown ...

Labels are zero-padded stage numbers. The executor processes labels in alphabetical order, so the
tensors of one stage are loaded, fitted, saved and released before those of the next stage are
loaded. (mergekit's own labels are names of tensors: `layers.10` would come before `layers.2`, and
several blocks would be in memory at the same time.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_dam.coefficients.merge import column_problem
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.shapes import correction_problem
from mergekit_dam.coefficients.tensors import TensorSpec
from mergekit_dam.errors import DamError
from mergekit_dam.host.compat import copy_non_floating_buffer
from mergekit_dam.host.fused import Region
from mergekit_dam.host.phases import FITS, WRITING
from mergekit_dam.host.stages import PlannedStage
from mergekit_dam.journal import Journal
from mergekit_dam.layers.fit import StageResult
from mergekit_dam.layers.sweep import Sweep
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.search import search
from mergekit_dam.sources.finite import require_finite, require_finite_merge
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.readahead import Span, read_ahead
from mergekit_dam.sources.stage import of_all, open_stage, placed
from mergekit_dam.streams import progress
from mergekit_dam.streams.stream import Stream


@dataclass(eq=False)
class StageNode:
    """A stage's place in the graph; compared by identity, since hashing tasks recurses.

    Attributes:
        planned: the stage, and the tasks that gather its own tensors.
        number: number of the stage.
        previous: the task of the stage before, or None.
        sweep: the fits of all stages.
        device: the device of the fit.
        ahead: byte ranges that the next stage will read.
    """

    planned: PlannedStage
    number: int
    previous: "FitStage | None"
    sweep: Sweep
    device: torch.device
    ahead: tuple[Span, ...] = ()


class FitStage(Task[Any], frozen=True, arbitrary_types_allowed=True):
    """Fits the input, one block, or the output of the model."""

    node: StageNode

    def arguments(self) -> dict[str, Task[Any]]:
        """The gathered tensors, and the result of the stage before."""
        arguments = {f"tensor_{i}": task for i, task in enumerate(self.node.planned.gathers)}
        if self.node.previous is not None:
            arguments["previous"] = self.node.previous
        return arguments

    def group_label(self) -> str:
        """The stage's label."""
        return self.node.planned.label

    def uses_accelerator(self) -> bool:
        """False: the fit moves the tensors, as many at a time as the device has room for."""
        return False

    def execute(self, previous: StageResult | None = None, **tensors: Any) -> StageResult:
        """Fit the stage and run the streams through it."""
        read_ahead(self.node.ahead)
        stage = self.node.planned.stage
        loaded = {spec.name: tensors[f"tensor_{index}"] for index, spec in enumerate(stage.tensors)}
        opened = open_stage(stage, placed(stage, loaded, self.node.device), self.node.device)
        require_finite(opened.loaded)
        if self.node.previous is None:
            progress.begin(FITS, done=self.node.sweep.done)
        return self.node.sweep.fit(self.node.number, opened)


class MergedTensor(Task[torch.Tensor], frozen=True, arbitrary_types_allowed=True):
    """Passes one merged tensor of a stage to the task that writes it."""

    fit: FitStage
    name: str

    def arguments(self) -> dict[str, Task[Any]]:
        """The result of the stage."""
        return {"result": self.fit}

    def group_label(self) -> str:
        """The stage's label."""
        return self.fit.group_label()

    def priority(self) -> int:
        """High, so that tensors are written, and released, early."""
        return 100

    def execute(self, result: StageResult) -> torch.Tensor:
        """Take the tensor out of the stage's result."""
        # Popped, not shared: the stage's result stays in memory until the next stage has run.
        merged = result.merged.pop(self.name)
        require_finite_merge(self.name, merged, {})
        return merged


@dataclass(eq=False)
class SearchNode:
    """Everything that a search needs; compared by identity, since hashing tasks recurses.

    Attributes:
        network: the stages of the model.
        streams: makes the streams at the model's input.
        settings: parameters of the merge.
        start: coefficients of every tensor to start from.
        journal: what the search keeps on the disk.
        started: `time.perf_counter()` when the merge began.
    """

    network: Network
    streams: Callable[[], list[Stream]]
    settings: RunParameters
    start: MergeRecord
    journal: Journal
    started: float


class Search(Task[Any], frozen=True, arbitrary_types_allowed=True):
    """Finds the coefficients of all tensors, before any tensor is merged."""

    node: SearchNode

    def arguments(self) -> dict[str, Task[Any]]:
        """None: the search loads the tensors itself."""
        return {}

    def group_label(self) -> str:
        """The empty label, which comes before all stages."""
        return ""

    def main_thread_only(self) -> bool:
        """True: the search uses mergekit's loaders, and every thread would open its own."""
        return True

    def execute(self) -> StageResult:
        """Run the search; its result holds the record alone."""
        node = self.node
        record = search(
            node.network,
            node.streams(),
            node.settings,
            node.start,
            journal=node.journal,
            started=node.started,
        )
        return StageResult([], record)


@dataclass(eq=False)
class Known:
    """A tensor that is merged once its coefficients are known.

    Attributes:
        spec: how the tensor is merged.
        gather: task that gathers the tensor from all sources.
        order: the sources, in the order of the rows of the coefficients.
        record: holds the coefficients if they are known from planning.
    """

    spec: TensorSpec
    gather: Task[Any]
    order: tuple[ModelReference, ...]
    record: MergeRecord | None = None


class MergeKnown(Task[torch.Tensor], frozen=True, arbitrary_types_allowed=True):
    """Merges one tensor with the coefficients of a replay, of a search, or of the average."""

    known: Known
    fit: Search | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """The gathered tensors, and the result of the search if there is one."""
        tensors = {"tensors": self.known.gather}
        return tensors if self.fit is None else {**tensors, "result": self.fit}

    def group_label(self) -> str | None:
        """The label of the gather task."""
        return self.known.gather.group_label()

    def uses_accelerator(self) -> bool:
        """True: mergekit moves the tensors to its device for computations."""
        return True

    def execute(
        self, tensors: dict[ModelReference, torch.Tensor], result: StageResult | None = None
    ) -> torch.Tensor:
        """Merge the tensor, in the dtype that is written; copy a buffer that is not floating point.

        Raises:
            DamError: the coefficients do not fit the tensor, or the result is not finite.
        """
        known, name = self.known, self.known.spec.name
        progress.advance(WRITING, f"merge {name}")
        loaded = of_all(tensors, known.order)
        buffer: torch.Tensor | None = copy_non_floating_buffer(loaded, name)
        if buffer is not None:
            return buffer
        record = known.record if result is None else result.record
        assert record is not None
        coefficients, axis = record.coefficients[name], record.axes.get(name, -1)
        sources = known.spec.sources(loaded)
        problem = column_problem(coefficients.shape[1], loaded[0].shape, axis)
        if problem:
            raise DamError(f"{name}: {problem}")
        correction = record.correction(name)
        if correction is not None:
            own = {key: tensor.shape for key, tensor in correction.tensors.items()}
            problem = correction_problem(own, loaded[0].shape, axis)
            if problem:
                raise DamError(f"{name}: {problem}")
        merged = sources.merged(coefficients, axis=axis, correction=correction)
        require_finite_merge(name, merged, tensors)
        return merged


class Piece(Task[torch.Tensor], frozen=True, arbitrary_types_allowed=True):
    """Cuts a tensor that mergekit asked for out of a merged fused one."""

    whole: Task[torch.Tensor]
    region: Region

    def arguments(self) -> dict[str, Task[Any]]:
        """The merged fused tensor."""
        return {"whole": self.whole}

    def group_label(self) -> str | None:
        """The label of the fused tensor's task."""
        return self.whole.group_label()

    def priority(self) -> int:
        """High, so that tensors are written, and released, early."""
        return 100

    def execute(self, whole: torch.Tensor) -> torch.Tensor:
        """Cut the piece out."""
        return self.region.cut(whole)


class WriteArtifacts(Task[None], frozen=True, arbitrary_types_allowed=True):
    """Writes coefficients and report beside the merged model after the last stage."""

    last: FitStage | Search | None
    write: Callable[[MergeRecord], None]
    record: MergeRecord | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """The result that holds the final record, unless the record is known from planning."""
        return {} if self.last is None else {"result": self.last}

    def group_label(self) -> str:
        """The label of the last fit, if there is one."""
        return "" if self.last is None else self.last.group_label()

    def main_thread_only(self) -> bool:
        """True: files are written on the main thread."""
        return True

    def execute(self, result: StageResult | None = None) -> None:
        """Write the files from the final record."""
        record = result.record if result is not None else self.record
        assert record is not None
        self.write(record)
