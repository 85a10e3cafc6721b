"""The tasks that mergekit's executor runs for a dam merge.

    one sweep:
    loads -> gathers -> FitStage (input) -> FitStage (block 0) -> ... -> FitStage (output)
                           |                  |                            |
                        MergedTensor ...   MergedTensor ...            WriteArtifacts
    a search:
    Search -> WriteArtifacts
       |
    loads -> gathers -> MergeKnown ...

Labels are zero-padded stage numbers: the executor works through labels in the order of their
text, so that the tensors of one stage are loaded, fitted, saved and released before the next
stage's are loaded. (With mergekit's own labels, names of tensors, `layers.10` would come
before `layers.2`, and several blocks would be in memory at a time.)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor
from mergekit.merge_methods.buffers import copy_non_floating_buffer
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo

from mergekit_dam.coefficients import column_counts, merge_weights
from mergekit_dam.errors import DamError
from mergekit_dam.fitting.streams import Stream
from mergekit_dam.fused import Region
from mergekit_dam.network import Network
from mergekit_dam.progress import show
from mergekit_dam.readahead import Span, read_ahead
from mergekit_dam.search import search
from mergekit_dam.settings import RunSettings
from mergekit_dam.stage import Progress, Record, Stage, TensorPlan, of_all
from mergekit_dam.vocabulary import Own, Vocabulary


class StageLoad(LoadTensor):
    """mergekit's LoadTensor, scheduled with its stage."""

    label: str

    def group_label(self) -> str:
        return self.label


class StageGather(GatherTensors):
    """mergekit's GatherTensors, scheduled with its stage."""

    label: str

    def arguments(self) -> dict[str, Task[Any]]:
        stock = super().arguments()
        return {key: StageLoad(**dict(load), label=self.label) for key, load in stock.items()}

    def group_label(self) -> str:
        return self.label


class KnownTokenizer(BuildTokenizer, arbitrary_types_allowed=True):
    """mergekit's BuildTokenizer, of what it has built already: every sweep asks for it."""

    vocabulary: Vocabulary

    def execute(self, **_: Any) -> TokenizerInfo:
        return self.vocabulary.info


class TeachersVocabulary(PermutedVocabulary):
    """mergekit's PermutedVocabulary, for a configuration that forces embeddings on tokens.

    What is merged of a model are the forced rows; the model itself goes by its own.
    """

    def execute(
        self, tokenizer_info: TokenizerInfo, tensors: dict[ModelReference, torch.Tensor]
    ) -> Any:
        assert self.tokens is not None
        unforced_tokens = {
            token: self.tokens[token].model_copy(update={"force": False}) for token in self.tokens
        }
        unforced = self.model_copy(update={"tokens": unforced_tokens})
        own = PermutedVocabulary.execute(unforced, tokenizer_info, tensors)
        aligned = super().execute(tokenizer_info, tensors)
        return {**aligned, **{Own(model): tensor for model, tensor in own.items()}}


@dataclass(eq=False)
class StageNode:
    """A stage's place in the graph; compared by identity, since hashing tasks recurses.

    Attributes:
        label: orders the stages.
        inputs: tensors of every source, one task an output tensor, in the order of the stage.
        previous: the stage before, or None.
        streams: makes the streams at the entrance, for the first stage.
        record: what is known from planning, for the first stage.
        ahead: what the next stage will read.
    """

    stage: Stage
    label: str
    inputs: tuple[Task[Any], ...]
    previous: "FitStage | None"
    streams: Callable[[], list[Stream]]
    record: Record = field(default_factory=Record)
    ahead: tuple[Span, ...] = ()


class FitStage(Task[Any], frozen=True, arbitrary_types_allowed=True):
    """Fits the input, one block, or the output of the model."""

    node: StageNode

    def arguments(self) -> dict[str, Task[Any]]:
        arguments = {f"tensor_{i}": task for i, task in enumerate(self.node.inputs)}
        if self.node.previous is not None:
            arguments["previous"] = self.node.previous
        return arguments

    def group_label(self) -> str:
        return self.node.label

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, previous: Progress | None = None, **tensors: Any) -> Progress:
        read_ahead(self.node.ahead)
        stage = self.node.stage
        loaded = {plan.name: tensors[f"tensor_{index}"] for index, plan in enumerate(stage.tensors)}
        streams = previous.streams if previous else self.node.streams()
        record = previous.record if previous else self.node.record
        return stage.run(loaded, streams, record, show=show)


class MergedTensor(Task[torch.Tensor], frozen=True, arbitrary_types_allowed=True):
    """Hands one merged tensor of a stage to whoever writes it."""

    fit: FitStage
    name: str

    def arguments(self) -> dict[str, Task[Any]]:
        return {"progress": self.fit}

    def group_label(self) -> str:
        return self.fit.group_label()

    def priority(self) -> int:
        return 100

    def execute(self, progress: Progress) -> torch.Tensor:
        # Handed over, not shared: the stage's result lives on until the next stage has run.
        return progress.merged.pop(self.name)


@dataclass(eq=False)
class SearchNode:
    """All that a search needs; compared by identity, since hashing tasks recurses.

    Attributes:
        streams: makes the streams at the entrance.
        start: coefficients of every tensor to start from.
        scratch: where hidden states are kept on disk.
    """

    network: Network
    streams: Callable[[], list[Stream]]
    settings: RunSettings
    start: Record
    scratch: Path


class Search(Task[Any], frozen=True, arbitrary_types_allowed=True):
    """Finds the coefficients of all tensors, before any tensor is merged."""

    node: SearchNode

    def arguments(self) -> dict[str, Task[Any]]:
        return {}

    def group_label(self) -> str:
        return ""  # before all stages

    def main_thread_only(self) -> bool:
        return True  # it reads models through mergekit's loaders, which each thread has anew

    def execute(self) -> Progress:
        node = self.node
        record = search(
            node.network,
            node.streams(),
            node.settings,
            node.start,
            scratch=node.scratch,
            show=show,
        )
        return Progress([], record)


@dataclass(eq=False)
class Known:
    """A tensor that is merged once its coefficients are known.

    Attributes:
        gather: brings the tensors of all sources.
        order: the sources, in the order of the rows of the coefficients.
        record: holds the coefficients, where they are known from planning.
    """

    plan: TensorPlan
    gather: Task[Any]
    order: tuple[ModelReference, ...]
    record: Record | None = None


class MergeKnown(Task[torch.Tensor], frozen=True, arbitrary_types_allowed=True):
    """Merges one tensor by coefficients: of a replay, of a search, or an average."""

    known: Known
    fit: Search | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        tensors = {"tensors": self.known.gather}
        return tensors if self.fit is None else {**tensors, "progress": self.fit}

    def group_label(self) -> str | None:
        return self.known.gather.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(
        self, tensors: dict[ModelReference, torch.Tensor], progress: Progress | None = None
    ) -> torch.Tensor:
        known, name = self.known, self.known.plan.name
        loaded = of_all(tensors, known.order)
        buffer: torch.Tensor | None = copy_non_floating_buffer(loaded, name)
        if buffer is not None:
            return buffer
        record = known.record if progress is None else progress.record
        assert record is not None
        coefficients, axis = record.coefficients[name], record.axes.get(name, -1)
        sources = known.plan.sources(loaded)
        allowed = column_counts(loaded[0].shape, axis)
        if coefficients.shape[1] not in allowed:
            raise DamError(
                f"{name}: required {allowed[-1]} coefficients a model, got "
                f"{coefficients.shape[1]}; they were fitted on models of another shape"
            )
        return merge_weights(sources.tensors, coefficients, axis=axis).to(sources.dtype)


class Piece(Task[torch.Tensor], frozen=True, arbitrary_types_allowed=True):
    """A tensor that mergekit asked for, cut out of a merged one that is made of several."""

    whole: Task[torch.Tensor]
    region: Region

    def arguments(self) -> dict[str, Task[Any]]:
        return {"whole": self.whole}

    def group_label(self) -> str | None:
        return self.whole.group_label()

    def priority(self) -> int:
        return 100

    def execute(self, whole: torch.Tensor) -> torch.Tensor:
        return self.region.cut(whole)


class WriteArtifacts(Task[None], frozen=True, arbitrary_types_allowed=True):
    """Writes coefficients and report beside the merged model, once the last stage is through."""

    last: FitStage | Search | None
    write: Callable[[Record], None]
    record: Record | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        return {} if self.last is None else {"progress": self.last}

    def group_label(self) -> str:
        return "" if self.last is None else self.last.group_label()

    def main_thread_only(self) -> bool:
        return True

    def execute(self, progress: Progress | None = None) -> None:
        record = progress.record if progress is not None else self.record
        assert record is not None
        self.write(record)
