"""The sizes of a merge: parts, tensors and text, as headers and configurations tell them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_dam.coefficients.correction import stored_bytes
from mergekit_dam.coefficients.tensors import TensorSettings
from mergekit_dam.estimate.merge import PlannedMerge, PlannedTensor
from mergekit_dam.estimate.sizes import PartSize, TensorSize
from mergekit_dam.estimate.structure import Group, groups_of
from mergekit_dam.estimate.text import Text
from mergekit_dam.host.compat import LoaderCache
from mergekit_dam.host.headers import Header
from mergekit_dam.host.synthetic import Writing
from mergekit_dam.parameters import RunParameters
from mergekit_dam.sources.stage import Stage

_PROBE_TOKENS = 2


@dataclass(frozen=True)
class Inventory:
    """The sizes of a whole merge.

    Attributes:
        parts: parts in the order the data passes them; none where nothing is fitted (a replay).
        outside: tensors that no part has, which are averaged; all where nothing is fitted.
        sources: number of models, including the base where it is not among the models to merge.
        files: bytes of every file of every source, one tuple per source.
        hidden: features of the residual stream.
        attended: features of all heads of one attention, 0 if the configuration does not tell.
        vocabulary: number of logits.
        settings: parameters of the fit; None where nothing is fitted.
        writing: what each model takes that writes its own calibration text.
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
    writing: tuple[Writing, ...] = ()

    @property
    def blocks(self) -> tuple[PartSize, ...]:
        """The decoder blocks."""
        return tuple(part for part in self.parts if part.kind == "block")

    @property
    def tensors(self) -> tuple[TensorSize, ...]:
        """All output tensors; a tensor of two parts is counted once."""
        every = (*(t for part in self.parts for t in part.tensors), *self.outside)
        return tuple({tensor.name: tensor for tensor in every}.values())

    @property
    def corrections(self) -> int:
        """Bytes of all corrections."""
        return sum(tensor.correction for tensor in self.tensors)

    @property
    def moving(self) -> int:
        """Bytes in files while factors descend: with a gradient and two moments each."""
        return 4 * sum(tensor.factors for tensor in self.tensors)


def take_inventory(planned: PlannedMerge) -> Inventory:
    """Take the sizes of a planned merge, without reading any weight."""
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
        files=planned.files,
        hidden=0 if text is None else text.hidden_size,
        attended=0 if text is None else _attended(text),
        vocabulary=0 if text is None else text.vocab_size,
        text=Text(
            tuple(sequences),
            tuple(map(prepared.run.held_out, sequences)),
            prepared.run.sequence_length,
        ),
        settings=prepared.run if planned.stages else None,
        writing=planned.writing,
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
            for had, got, header in zip(stored, loaded, tensor.headers.values(), strict=True)
            if had != got or tensor.copies or _dequantised(header)
        ),
        written=count * (planned.out_dtype or promoted).itemsize,
        matrix=len(shape) == 2,
        loads=frozenset(loaded),
        writes=planned.out_dtype or promoted,
    )


def _stored(model: ModelReference, header: Header | None) -> torch.dtype:
    """The dtype that a tensor is stored in, by its header or else by the configuration."""
    if header is not None and header.dtype is not None:
        return header.dtype
    configured = getattr(model.config(LoaderCache().trust_remote_code), "dtype", None)
    return configured if isinstance(configured, torch.dtype) else torch.float32


def _dequantised(header: Header | None) -> bool:
    """Whether a tensor that is loaded in its header's dtype has other bytes in the file."""
    if header is None or header.dtype is None:
        return False
    return header.length != math.prod(header.shape) * header.dtype.itemsize


def _shape_of(name: str, planned: PlannedMerge) -> tuple[int, ...]:
    """A tensor's shape, by the first header that tells it or else by the model's definition."""
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
    # The linears of blocks have corrections, and a head of its own.
    head = f"{decoder.head_name}.weight"
    every = [p for p in stage.tensors if stage.kind == "block" or p.in_model == head]
    corrected = [p.settings for p in every if p.settings.correction != "none"]
    kinds = {settings.correction for settings in corrected}
    return PartSize(
        kind=stage.kind,
        tensors=tuple(
            _corrected(
                sizes[p.name],
                own[p.in_model].shape,
                p.settings,
                stage.models.settings,
            )
            if p in every
            else sizes[p.name]
            for p in stage.all_tensors
        ),
        groups=known[key],
        unknowns=max(p.settings.parametrisation.expand.shape[1] for p in stage.all_tensors),
        fits_head="head" in units and all(p.settings.fits("head") for p in stage.tensors),
        by_column=any(p.settings.granularity == "column" for p in stage.all_tensors),
        experts="all" if any(p.settings.experts == "all" for p in stage.tensors) else "routed",
        correction="full" if "full" in kinds else "low_rank" if kinds else "none",
        correction_rank=max((s.correction_rank for s in corrected), default=0),
    )


def _corrected(
    size: TensorSize, shape: Sequence[int], settings: TensorSettings, run: RunParameters
) -> TensorSize:
    """A tensor's sizes with those of its correction."""
    kind, rank = settings.correction, settings.correction_rank
    swept, descended = run.objective != "logits", run.objective != "layer"
    factors = stored_bytes(shape, "none" if kind == "none" else "low_rank", rank)
    return replace(
        size,
        correction=stored_bytes(shape, kind, rank, swept=swept, descended=descended),
        factors=factors if descended else 0,
        rank=min(rank, *shape[-2:]) if factors and descended else 0,
    )


def _entering(stage: Stage) -> Tensor:
    if stage.kind == "input":
        return torch.zeros((1, _PROBE_TOKENS), dtype=torch.long)
    hidden = stage.models.output.config.get_text_config().hidden_size
    return torch.zeros((1, _PROBE_TOKENS, hidden))


def _attended(text: Any) -> int:
    """Features of all attention heads together."""
    heads = getattr(text, "num_attention_heads", 0)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return int(heads * size)
