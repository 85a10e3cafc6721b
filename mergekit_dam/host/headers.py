"""Headers of the models' files: name, shape, dtype and place of tensors, without values."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from safetensors import safe_open

from mergekit_dam.host.compat import (
    ExecuteMergeMethodTask,
    GatherTensors,
    LazyTensorLoader,
    LoaderCache,
    PermutedVocabulary,
    TruncatedVocabulary,
    WeightInfo,
)
from mergekit_dam.host.compat import can_convert as can_convert
from mergekit_dam.sources.readahead import Span

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


def present_name(info: WeightInfo, loader: LazyTensorLoader) -> str | None:
    """The name that a model has a tensor by, if it has it."""
    names = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
    return next((name for name in names if name in loader.index.tensor_paths), None)


def is_made(model: ModelReference, name: str, stored: set[str]) -> bool:
    """Whether mergekit makes the tensor of others when it loads it (fused experts, say)."""
    model_type = _model_type(model, LoaderCache().trust_remote_code)
    return bool(can_convert(model_type, stored, name))


@lru_cache(maxsize=64)  # mergekit parses the configuration anew each time
def _model_type(model: ModelReference, trust_remote_code: bool) -> str:
    return str(model.config(trust_remote_code=trust_remote_code).model_type)


def header_of(info: WeightInfo, model: ModelReference) -> Header | None:
    """What the header of a model's file says of a tensor; None where none tells."""
    loader = LoaderCache().get(model)
    name = present_name(info, loader)
    return None if name is None else file_headers(loader).get(name)


def file_headers(loader: LazyTensorLoader) -> Mapping[str, Header]:
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


WeightTask = tuple[WeightInfo, ExecuteMergeMethodTask]


def spans_of(tasks: Iterable[Task[Any]]) -> tuple[Span, ...]:
    """Where the tensors that mergekit's tasks gather lie in safetensors files.

    Tensors that are pickled, or that mergekit makes of others, are left out.
    """
    return tuple(span for task in tasks for span in _spans(task))


def _spans(task: Task[Any]) -> Iterator[Span]:
    while isinstance(task, (PermutedVocabulary, TruncatedVocabulary)):
        task = task.gather_tensors
    if not isinstance(task, GatherTensors):
        return
    for model, weight in task.weight_info.items():
        header = header_of(weight, model)
        if header is not None:
            yield Span(header.file, header.offset, header.length)
