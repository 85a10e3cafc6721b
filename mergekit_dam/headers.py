"""Checks of the sources' tensors that need no weight: names and shapes, from headers alone."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from safetensors import safe_open

from mergekit_dam.errors import ArchitectureError

_SHOWN = 5

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the dtypes that a merge reads."""


@dataclass(frozen=True)
class Header:
    """What a file's header says of one tensor.

    Attributes:
        dtype: that it is stored in; None for one that torch has no name for here.
        file: that holds it.
        offset, length: bytes of the file that are its values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    offset: int
    length: int


def check_headers(
    planned: Sequence[tuple[WeightInfo, ExecuteMergeMethodTask]], order: Sequence[ModelReference]
) -> dict[str, tuple[int, ...]]:
    """See that every source has every planned tensor, all of one shape.

    Vocabularies that an adapter brings into one may have any number of rows. Tensors that a
    checkpoint holds in another layout, or that are pickled, are left to be checked when they are
    loaded.

    Returns:
        output tensor's name -> shape, where headers tell it.

    Raises:
        ArchitectureError: naming the first tensors that are missing or differ.
    """
    problems = []
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, task in planned:
        gather, free = task.gather_tensors, None
        if isinstance(gather, (PermutedVocabulary, TruncatedVocabulary)):
            gather, free = gather.gather_tensors, weight.vocabulary_axis
        assert isinstance(gather, GatherTensors)
        found = {}
        # A model that a slice leaves out has no tensor here; a map's own order is that of hashes.
        for model in (model for model in order if model in gather.weight_info.data):
            loader = LoaderCache().get(model)
            info = gather.weight_info[model]
            name = present_name(info, loader)
            if name is not None:
                header = _headers(loader).get(name)
                found[model] = None if header is None else header.shape
            elif not is_made(model, info.name, set(loader.index.tensor_paths)):
                have = "some models have it, " if weight.optional else ""
                problems.append(f"{weight.name}: {have}{model} has not")
        known = {model: shape for model, shape in found.items() if shape is not None}
        if free is None:
            shapes.update((weight.name, shape) for shape in known.values())
        if len({_without(shape, free) for shape in known.values()}) > 1:
            listed = ", ".join(f"{m} {list(s)}" for m, s in known.items())
            hint = (
                "; write `tokenizer: {source: union}`, or pass --unsafe-truncate-embeddings where "
                "only the padding differs"
                if weight.vocabulary_axis is not None and free is None
                else ""
            )
            problems.append(f"{weight.name}: shapes differ: {listed}{hint}")
    if problems:
        more = len(problems) - _SHOWN
        lines = [*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise ArchitectureError(
            "required the same tensors in all models, as mergekit's definition of the architecture "
            "lists them, got:\n" + "\n".join(f"  - {line}" for line in lines)
        )
    return shapes


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def present_name(info: WeightInfo, loader: LazyTensorLoader) -> str | None:
    """The name that a model has a tensor by, if it has it."""
    names = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
    return next((name for name in names if name in loader.index.tensor_paths), None)


def is_made(model: ModelReference, name: str, stored: set[str]) -> bool:
    """Whether mergekit makes the tensor of others when it loads it (fused experts, say)."""
    model_type = _model_type(model, LoaderCache().trust_remote_code)
    return bool(can_convert_checkpoint_keys(model_type, stored, name))


@lru_cache(maxsize=64)  # mergekit parses the configuration anew each time
def _model_type(model: ModelReference, trust_remote_code: bool) -> str:
    return str(model.config(trust_remote_code=trust_remote_code).model_type)


def header_of(info: WeightInfo, model: ModelReference) -> Header | None:
    """What the header of a model's file says of a tensor; None where none tells."""
    loader = LoaderCache().get(model)
    name = present_name(info, loader)
    return None if name is None else _headers(loader).get(name)


def _headers(loader: LazyTensorLoader) -> Mapping[str, Header]:
    if not loader.index.is_safetensors:
        return {}
    return _read_headers(loader.index.base_path, tuple(s.filename for s in loader.index.shards))


@lru_cache(maxsize=16)
def _read_headers(folder: str, shards: tuple[str, ...]) -> Mapping[str, Header]:
    headers = {}
    for shard in shards:
        file = Path(folder) / shard
        with safe_open(file, framework="pt"):  # refuses what is no such file
            values, entries = _parsed(file)
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"])
            shape = tuple(entry["shape"])
            headers[name] = Header(shape, dtype, file, values + first, last - first)
    return headers


def _parsed(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the values of a safetensors file begin, and what its header says of each tensor."""
    with file.open("rb") as raw:
        (size,) = struct.unpack("<Q", raw.read(8))
        entries: dict[str, Any] = json.loads(raw.read(size))
    entries.pop("__metadata__", None)
    return 8 + size, entries
