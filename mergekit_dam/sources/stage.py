"""One stage of a merge: the model's input, a block or its output, with its tensors once loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorSources, TensorSpec
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.part import Part, block_part, input_part, output_part, without_tokens
from mergekit_dam.model.units import Anatomy
from mergekit_dam.parameters import RunParameters
from mergekit_dam.streams.distributed import from_first
from mergekit_dam.streams.memory import memory_of
from mergekit_dam.streams.storage import may_stay
from mergekit_dam.vocabulary.merged import OwnRows

Loaded = Mapping[str, Mapping[Any, Tensor]]
"""Output tensor's name -> source -> tensor.

A source on which other rows are forced also has a tensor of its own rows, under `OwnRows`.
"""

StageKind = Literal["input", "block", "output"]


def of_all(
    loaded: Mapping[ModelReference, Tensor], order: Sequence[ModelReference]
) -> list[Tensor]:
    """One tensor per source; a loaded tensor takes the place of those that are not loaded.

    A tensor that is not loaded is neither merged nor used by a teacher: its coefficients are 0.
    """
    instead = next(loaded[model] for model in order if model in loaded)
    return [loaded.get(model, instead) for model in order]


@dataclass(frozen=True)
class Models:
    """The decoders of a merge and what they share.

    Attributes:
        output: Decoder of the merged model.
        sources: Decoder of every source; the merged model's own where configurations agree.
        order: The sources.
        settings: Settings of the fit.
        anatomies: Anatomies by the printed structure of a part; parts built alike share one.
        unknown: Source's index -> mask of the tokens that it does not have, bool `[vocabulary]`;
            sources with all tokens are absent.
    """

    output: Decoder
    sources: tuple[Decoder, ...]
    order: tuple[ModelReference, ...]
    settings: RunParameters
    anatomies: dict[str, Anatomy] = field(default_factory=dict)
    unknown: Mapping[int, Tensor] = field(default_factory=dict)

    def examine(self, part: Part, weights: Mapping[str, Tensor], like: Tensor) -> Anatomy:
        """The anatomy of a part; blocks that are built alike are examined once."""
        key = f"{part.residual} {sorted(weights)} {part.root}"
        if key not in self.anatomies:
            self.anatomies[key] = from_first(lambda: part.anatomy(weights, like))
        return self.anatomies[key]

    def move(self, device: torch.device) -> None:
        """Run all decoders on `device` from now on."""
        for decoder in {id(d): d for d in (self.output, *self.sources)}.values():
            decoder.move(device)


@dataclass(eq=False)
class Stage:
    """The input, one block, or the output of the model, as planned.

    Attributes:
        kind: Kind of part.
        index: Index of the block.
        tensors: Output tensors of the stage.
        borrowed: Output tensors of an earlier stage that this part also uses (for a tied head).
    """

    models: Models
    kind: StageKind
    index: int
    tensors: Sequence[TensorSpec]
    borrowed: Sequence[TensorSpec] = ()

    @property
    def all_tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors that are read for the stage: its own and the borrowed ones."""
        return (*self.tensors, *self.borrowed)

    @property
    def number(self) -> int:
        """Its number among all stages."""
        blocks = len(self.models.output.blocks)
        return {"input": 0, "block": self.index + 1, "output": blocks + 1}[self.kind]

    @property
    def label(self) -> str:
        """Name of the stage in messages and logs."""
        return self.part(self.models.output).label

    def part(self, decoder: Decoder) -> Part:
        """The stage's part of a decoder."""
        if self.kind == "block":
            return block_part(decoder, self.index, self.models.settings.dtype_on(decoder.device))
        return input_part(decoder) if self.kind == "input" else output_part(decoder)

    def teacher_part(self, source: int) -> Part:
        """The stage's part of a source's own model."""
        part = self.part(self.models.sources[source])
        if self.kind != "output" or source not in self.models.unknown:
            return part
        return without_tokens(part, self.models.unknown[source])


@dataclass
class OpenStage:
    """A stage with the loaded weights of all sources.

    Attributes:
        loaded: Output tensor's name -> source -> tensor, on the device or on the host.
        device: Device on which its parts run.
    """

    stage: Stage
    loaded: Loaded
    device: torch.device

    def close(self) -> None:
        """Release the weights, even where the stage itself is still referenced."""
        self.loaded = {}
        vars(self).pop("sources", None)

    @cached_property
    def part(self) -> Part:
        """The stage's part of the merged model."""
        return self.stage.part(self.stage.models.output)

    @cached_property
    def sources(self) -> dict[str, TensorSources]:
        """Sources of the tensors that the part uses, by names relative to the part."""
        return {
            self._relative(spec): self.sources_of(spec)
            for spec in self.stage.all_tensors
            if spec.tied_to is None
        }

    @property
    def own(self) -> dict[str, TensorSources]:
        """Sources of the stage's own tensors, without those borrowed from an earlier stage."""
        borrowed = {self._relative(spec) for spec in self.stage.borrowed}
        return {name: own for name, own in self.sources.items() if name not in borrowed}

    def _relative(self, spec: TensorSpec) -> str:
        return spec.in_model[len(self.part.prefix) :]

    def sources_of(self, spec: TensorSpec) -> TensorSources:
        """The loaded tensors of every source for an output tensor."""
        found, order = self.loaded[spec.name], self.stage.models.order
        tensors = of_all(found, order)
        if not any(OwnRows(model) in found for model in order):
            return spec.sources(tensors)
        teachers = [found.get(OwnRows(m), tensor) for m, tensor in zip(order, tensors, strict=True)]
        return spec.sources(tensors, teachers)

    def by_name(self, name: str) -> TensorSources:
        """The sources of the output tensor with this name."""
        return next(tensor for tensor in self.sources.values() if tensor.name == name)

    def teacher_part(self, source: int) -> Part:
        """The stage's part of a source's own model."""
        return self.stage.teacher_part(source)

    def teacher_weights(self, source: int) -> dict[str, Tensor]:
        """Weights of a source's own model, as they run, by names relative to the part."""
        return {
            name: self.part.as_run(tensor.teacher(source).to(self.device))
            for name, tensor in self.sources.items()
        }

    def merged_weights(self, point: MergeRecord) -> dict[str, Tensor]:
        """Weights of the merged model with some coefficients, cast as when written, then to fp32.

        Unlike `starting_weights`, all are fp32: gradients of weights are summed in their dtype.
        """
        return {
            name: tensor.on(self.device)
            .merged(
                point.coefficients[tensor.name],
                axis=point.axes.get(tensor.name, -1),
                correction=point.correction(tensor.name),
                as_written=False,
            )
            .float()
            for name, tensor in self.sources.items()
        }

    def starting_weights(self) -> dict[str, Tensor]:
        """Weights of the merged model at the start of a fit, as they run: the stage's own."""
        return {
            name: self.part.as_run(own.on(self.device).merged(own.start()))
            for name, own in self.own.items()
        }

    def anatomy(self, like: Tensor) -> Anatomy:
        """The anatomy of the part; `like` is an input of it, with any number of tokens."""
        return self.stage.models.examine(self.part, self.starting_weights(), like)


def open_stage(stage: Stage, loaded: Loaded, device: torch.device) -> OpenStage:
    """Open a stage whose tensors are loaded; its models run on `device` from now on."""
    stage.models.move(device)
    return OpenStage(stage, loaded, device)


def placed(stage: Stage, loaded: Loaded, device: torch.device) -> Loaded:
    """A stage's tensors on the device; a block's stay on the host where they are too many."""
    size = sum(tensor.nbytes for own in loaded.values() for tensor in own.values())
    if stage.kind == "block" and not may_stay(size, memory_of(device)):
        return loaded
    return {
        name: {model: tensor.to(device) for model, tensor in own.items()}
        for name, own in loaded.items()
    }
