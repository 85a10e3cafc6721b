"""One stage of a merge: input, block or output of the model, and its tensors once loaded."""

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
from mergekit_dam.vocabulary.merged import OwnRows

Loaded = Mapping[str, Mapping[Any, Tensor]]
"""Output tensor's name -> source, or `OwnRows` of it where other rows are forced -> tensor."""

StageKind = Literal["input", "block", "output"]


def of_all(
    loaded: Mapping[ModelReference, Tensor], order: Sequence[ModelReference]
) -> list[Tensor]:
    """One tensor of every source; one that is loaded stands in for those that are not.

    What is not loaded is neither merged nor a teacher's: its coefficients are 0.
    """
    instead = next(loaded[model] for model in order if model in loaded)
    return [loaded.get(model, instead) for model in order]


@dataclass(frozen=True)
class Models:
    """The decoders of a merge and what they share.

    Attributes:
        output: decoder of the merged model.
        sources: decoder of every source; the merged model's own where configurations agree.
        order: the sources.
        settings: of the fit.
        anatomies: what was found of parts that are built alike, by their printed structure.
        unknown: tokens that a source does not have, bool `[vocabulary]`; none named if it has all.
    """

    output: Decoder
    sources: tuple[Decoder, ...]
    order: tuple[ModelReference, ...]
    settings: RunParameters
    anatomies: dict[str, Anatomy] = field(default_factory=dict)
    unknown: Mapping[int, Tensor] = field(default_factory=dict)

    def examine(self, part: Part, weights: Mapping[str, Tensor], like: Tensor) -> Anatomy:
        """The anatomy of a part, examined once for all blocks built alike."""
        key = f"{part.residual} {sorted(weights)} {part.root}"
        if key not in self.anatomies:
            self.anatomies[key] = from_first(lambda: part.anatomy(weights, like))
        return self.anatomies[key]

    def move(self, device: torch.device) -> None:
        """Have all decoders run on a device."""
        for decoder in {id(d): d for d in (self.output, *self.sources)}.values():
            decoder.move(device)


@dataclass(eq=False)
class Stage:
    """The input, one block, or the output of the model, as planned.

    Attributes:
        kind: which part of the model.
        index: of the block.
        tensors: output tensors of the stage.
        borrowed: tensors of an earlier stage that this part runs on too (a tied head's).
    """

    models: Models
    kind: StageKind
    index: int
    tensors: Sequence[TensorSpec]
    borrowed: Sequence[TensorSpec] = ()

    @property
    def all_tensors(self) -> tuple[TensorSpec, ...]:
        """Tensors that are read for the stage: its own, and those it borrows."""
        return (*self.tensors, *self.borrowed)

    @property
    def label(self) -> str:
        """For people."""
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
    """A stage with the weights of all sources at hand.

    Attributes:
        loaded: output tensor's name -> source -> tensor, on the device of the fit.
    """

    stage: Stage
    loaded: Loaded

    def close(self) -> None:
        """Let go of the weights, whoever still holds the stage."""
        self.loaded = {}
        vars(self).pop("sources", None)

    @cached_property
    def part(self) -> Part:
        """The stage's part of the merged model."""
        return self.stage.part(self.stage.models.output)

    @cached_property
    def sources(self) -> dict[str, TensorSources]:
        """The tensors that the part runs on, by names relative to it."""
        return {
            self._relative(spec): self.sources_of(spec)
            for spec in self.stage.all_tensors
            if spec.tied_to is None
        }

    @property
    def own(self) -> dict[str, TensorSources]:
        """Those of them that are the stage's own: not borrowed from an earlier one."""
        borrowed = {self._relative(spec) for spec in self.stage.borrowed}
        return {name: own for name, own in self.sources.items() if name not in borrowed}

    def _relative(self, spec: TensorSpec) -> str:
        return spec.in_model[len(self.part.prefix) :]

    def sources_of(self, spec: TensorSpec) -> TensorSources:
        """An output tensor with the loaded tensors of every source."""
        found, order = self.loaded[spec.name], self.stage.models.order
        tensors = of_all(found, order)
        teachers = [found.get(OwnRows(m), tensor) for m, tensor in zip(order, tensors, strict=True)]
        return spec.sources(tensors, teachers)

    def by_name(self, name: str) -> TensorSources:
        """The sources of an output tensor."""
        return next(tensor for tensor in self.sources.values() if tensor.name == name)

    def teacher_part(self, source: int) -> Part:
        """The stage's part of a source's own model."""
        return self.stage.teacher_part(source)

    def teacher_weights(self, source: int) -> dict[str, Tensor]:
        """Weights of a source's own model, fp32, by relative names."""
        return {name: tensor.teacher(source) for name, tensor in self.sources.items()}

    def merged_weights(self, point: MergeRecord) -> dict[str, Tensor]:
        """Weights of the merged model at some coefficients: as written, then fp32."""
        return {
            name: tensor.merged(
                point.coefficients[tensor.name], axis=point.axes.get(tensor.name, -1)
            ).float()
            for name, tensor in self.sources.items()
        }

    def starting_weights(self) -> dict[str, Tensor]:
        """Weights of the merged model at the start of a fit, of the stage's own tensors."""
        return {name: own.merged(own.start()).float() for name, own in self.own.items()}

    def anatomy(self, like: Tensor) -> Anatomy:
        """What the part is made of; `like` is what enters it, of any number of tokens."""
        return self.stage.models.examine(self.part, self.starting_weights(), like)


def open_stage(stage: Stage, loaded: Loaded, device: torch.device) -> OpenStage:
    """A stage whose tensors are loaded; its models run on their device from now on."""
    stage.models.move(device)
    return OpenStage(stage, loaded)
