"""What there is to merge: parts, tensors and text, as the headers and configurations tell."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from mergekit_dam.estimate.merge import PlannedMerge, PlannedTensor
from mergekit_dam.estimate.structure import Group, UnitShape, groups_of
from mergekit_dam.host.headers import Header
from mergekit_dam.parameters import RunParameters
from mergekit_dam.sources.stage import Stage, StageKind
from mergekit_dam.streams.share import Share

_PROBE_TOKENS = 2


@dataclass(frozen=True)
class TensorSize:
    """One output tensor.

    Attributes:
        parameters: of the merged tensor.
        stored: bytes in the files of all sources.
        loaded: bytes of all sources once they are loaded.
        converted: bytes of them that are no pages of a file, since their dtype is another or
            they are brought into one vocabulary.
        half: a source's tensor as loaded is not fp32, so that running it takes a copy.
        written: bytes.
    """

    name: str
    parameters: int
    stored: int
    loaded: int
    converted: int
    half: bool
    written: int


@dataclass(frozen=True)
class PartSize:
    """Input, one block, or output of the model.

    Attributes:
        tensors: of its stage; with those that the output borrows from the input.
        groups: its units by stages of the fit, in the order the data passes them.
        unknowns: of a column of a linear.
        fits_head: it has an output head of its own, which is fitted.
    """

    kind: StageKind
    tensors: tuple[TensorSize, ...]
    groups: tuple[Group, ...]
    unknowns: int
    fits_head: bool = False

    @property
    def parameters(self) -> int:
        """Of the merged part."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def units(self) -> tuple[UnitShape, ...]:
        """All units, in call order."""
        return tuple(unit for group in self.groups for unit in group)

    def of(self, *kinds: str) -> tuple[UnitShape, ...]:
        """Units of some kinds."""
        return tuple(unit for unit in self.units if unit.kind in kinds)


@dataclass(frozen=True)
class Text:
    """Calibration sequences of the models that have some.

    Attributes:
        sequences: of each.
        held_out: of each; the last so many.
        length: of a sequence, in tokens.
    """

    sequences: tuple[int, ...]
    held_out: tuple[int, ...]
    length: int

    @property
    def models(self) -> int:
        """How many have text."""
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """Of all models."""
        return self.length * sum(self.sequences)

    @property
    def held_out_tokens(self) -> int:
        """Of all models: those that judge."""
        return self.length * sum(self.held_out)

    @property
    def fit_tokens(self) -> int:
        """Of all models: those of the fit."""
        return self.tokens - self.held_out_tokens

    def first_tokens(self, limit: int) -> int:
        """Of all models: sequences of the fit of about `limit` tokens of each, at least one."""
        most = max(1, limit // self.length)
        splits = zip(self.sequences, self.held_out, strict=True)
        return self.length * sum(
            min(Share.of_all(n, held).count("fit"), most) for n, held in splits
        )


@dataclass(frozen=True)
class Inventory:
    """What there is to merge.

    Attributes:
        parts: in the order the data passes them; none where nothing is fitted, as in a replay.
        outside: tensors that no part holds: averaged, or all of them where nothing is fitted.
        sources: models, and the base where it is none of them.
        files: bytes of every file of every source, with those of one model together.
        hidden: features of the residual stream.
        attended: features of all heads of one attention, 0 if the configuration does not tell.
        vocabulary: of the logits.
        settings: of the fit; None where there is none.
    """

    parts: tuple[PartSize, ...]
    outside: tuple[TensorSize, ...]
    sources: int
    files: tuple[tuple[int, ...], ...]
    hidden: int
    attended: int
    vocabulary: int
    text: Text
    settings: RunParameters | None

    @property
    def blocks(self) -> tuple[PartSize, ...]:
        """The decoder blocks."""
        return tuple(part for part in self.parts if part.kind == "block")

    @property
    def tensors(self) -> tuple[TensorSize, ...]:
        """All output tensors, each once."""
        every = (*(t for part in self.parts for t in part.tensors), *self.outside)
        return tuple({tensor.name: tensor for tensor in every}.values())


def take_inventory(planned: PlannedMerge) -> Inventory:
    """Put together what a planned merge is made of; no weight is read."""
    sizes = {
        name: _size(name, tensor, planned, _shape_of(name, planned))
        for name, tensor in planned.tensors.items()
    }
    known: dict[str, tuple[Group, ...]] = {}
    parts = tuple(_part(stage, sizes, known) for stage in planned.stages)
    inside = {tensor.name for part in parts for tensor in part.tensors}
    prepared = planned.prepared
    sequences = [len(calibration.tokens) for calibration in prepared.calibration.values()]
    decoder = planned.stages[0].models.output if planned.stages else None
    text = None if decoder is None else decoder.config.get_text_config()
    return Inventory(
        parts=parts,
        outside=tuple(size for name, size in sizes.items() if name not in inside),
        sources=len({model for tensor in planned.tensors.values() for model in tensor.headers}),
        files=_files(planned.tensors.values()),
        hidden=0 if text is None else text.hidden_size,
        attended=0 if text is None else _attended(text),
        vocabulary=0 if text is None else text.vocab_size,
        text=Text(
            tuple(sequences),
            tuple(map(prepared.run.held_out, sequences)),
            prepared.run.sequence_length,
        ),
        settings=prepared.run if planned.stages else None,
    )


def _size(
    name: str, tensor: PlannedTensor, planned: PlannedMerge, shape: tuple[int, ...]
) -> TensorSize:
    count = math.prod(shape)
    stored = [_stored(model, header) for model, header in tensor.headers.items()]
    loaded = [tensor.dtype or dtype for dtype in stored]
    promoted = loaded[0]
    for dtype in loaded[1:]:
        promoted = torch.promote_types(promoted, dtype)
    if tensor.copies:  # of one dtype
        loaded = [promoted] * len(loaded)
    held = max(1, tensor.copies)
    return TensorSize(
        name=name,
        parameters=count,
        stored=sum(
            count * dtype.itemsize if header is None else header.length
            for dtype, header in zip(stored, tensor.headers.values(), strict=True)
        ),
        loaded=sum(held * count * dtype.itemsize for dtype in loaded),
        converted=sum(
            held * count * got.itemsize
            for had, got in zip(stored, loaded, strict=True)
            if had != got or tensor.copies
        ),
        half=any(dtype != torch.float32 for dtype in loaded),
        written=count * (planned.out_dtype or promoted).itemsize,
    )


def _stored(model: ModelReference, header: Header | None) -> torch.dtype:
    """The dtype a tensor is stored in; where no header tells, that of the configuration."""
    if header is not None and header.dtype is not None:
        return header.dtype
    configured = getattr(model.config(LoaderCache().trust_remote_code), "dtype", None)
    return configured if isinstance(configured, torch.dtype) else torch.float32


def _shape_of(name: str, planned: PlannedMerge) -> tuple[int, ...]:
    """A tensor's shape, from the first header that tells it, else from the model's definition."""
    headers, rows = planned.tensors[name].headers.values(), planned.tensors[name].rows
    found = next((header.shape for header in headers if header is not None), None)
    if found is not None and rows is not None:
        axis, size = rows
        return (*found[:axis], size, *found[axis + 1 :])
    if found is not None:
        return found
    parameters = planned.stages[0].models.output.model.state_dict() if planned.stages else {}
    return tuple(parameters[name].shape) if name in parameters else ()


def _part(
    stage: Stage, sizes: Mapping[str, TensorSize], known: dict[str, tuple[Group, ...]]
) -> PartSize:
    decoder = stage.models.output
    part = stage.part(decoder)
    names = [spec.in_model for spec in stage.all_tensors if spec.tied_to is None]
    own = decoder.model.state_dict(keep_vars=True)
    shapes = {name[len(part.prefix) :]: tuple(own[name].shape) for name in names}
    key = f"{stage.kind} {sorted(shapes)} {part.root}"
    if key not in known:
        known[key] = groups_of(part, shapes, _entering(stage), decoder.head_name)
    units = {unit.kind for group in known[key] for unit in group}
    return PartSize(
        kind=stage.kind,
        tensors=tuple(sizes[spec.name] for spec in stage.all_tensors),
        groups=known[key],
        unknowns=max(p.settings.parametrisation.expand.shape[1] for p in stage.all_tensors),
        fits_head="head" in units and all(p.settings.fits("head") for p in stage.tensors),
    )


def _entering(stage: Stage) -> Tensor:
    if stage.kind == "input":
        return torch.zeros((1, _PROBE_TOKENS), dtype=torch.long)
    hidden = stage.models.output.config.get_text_config().hidden_size
    return torch.zeros((1, _PROBE_TOKENS, hidden))


def _attended(text: Any) -> int:
    """Features of all heads together."""
    heads = getattr(text, "num_attention_heads", 0)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return int(heads * size)


def _files(tensors: Iterable[PlannedTensor]) -> tuple[tuple[int, ...], ...]:
    """Bytes of the files of each model; those that no header names are not among them."""
    found: dict[ModelReference, set[Path]] = {}
    for tensor in tensors:
        for model, header in tensor.headers.items():
            found.setdefault(model, set()).update([] if header is None else [header.file])
    return tuple(tuple(file.stat().st_size for file in sorted(own)) for own in found.values())
