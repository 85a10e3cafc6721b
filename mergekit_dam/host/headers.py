"""Headers of the models' files: name, shape, dtype and position of tensors, without values."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task

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
from mergekit_dam.host.loaders import NoValues, PlainLoader
from mergekit_dam.model.checkpoint import opened
from mergekit_dam.sources.readahead import Span
from mergekit_dam.stored import DTYPES, read_header


@dataclass(frozen=True)
class Header:
    """The entry of one tensor in a file's header.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype in which it is stored; None if that is none of `DTYPES`.
        file: file that holds it.
        offset, length: byte range of its values in the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    offset: int
    length: int


def present_name(info: WeightInfo, loader: LazyTensorLoader) -> str | None:
    """The name under which a model has a tensor; None if it does not have it."""
    names = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
    return next((name for name in names if name in loader.index.tensor_paths), None)


def is_made(model: ModelReference, name: str, stored: set[str]) -> bool:
    """Whether mergekit's loader makes the tensor from others (fused experts, for example)."""
    model_type = _model_type(model, LoaderCache().trust_remote_code)
    return bool(can_convert(model_type, stored, name))


@lru_cache(maxsize=64)  # mergekit parses the configuration anew each time
def _model_type(model: ModelReference, trust_remote_code: bool) -> str:
    return str(model.config(trust_remote_code=trust_remote_code).model_type)


def header_of(info: WeightInfo, model: ModelReference) -> Header | None:
    """The entry of a tensor in the headers of a model's files; None if there is none."""
    loader = LoaderCache().get(model)
    name = present_name(info, loader)
    return None if name is None else file_headers(loader).get(name)


def file_headers(loader: LazyTensorLoader) -> Mapping[str, Header]:
    """The header entries of all tensors of a model, by name; empty if the files are pickled.

    Weights that are dequantised have the shape and the dtype in which they are loaded, and the
    place of their codes. Those whose shape stands in values are left out where there are none.

    Raises:
        ArchitectureError: quantised weights do not say their shape.
    """
    if not loader.index.is_safetensors:
        return {}
    if isinstance(loader, PlainLoader) and loader.quantisation.weights:
        return _dequantised_headers(loader)
    return _read_headers(loader.index.base_path, tuple(s.filename for s in loader.index.shards))


@lru_cache(maxsize=16)
def _dequantised_headers(loader: PlainLoader) -> Mapping[str, Header]:
    stored = _read_headers(loader.index.base_path, tuple(s.filename for s in loader.index.shards))
    weights = loader.quantisation.weights
    headers = {name: header for name, header in stored.items() if name not in weights}
    for name, quantised in weights.items():
        codes = stored[quantised.stored]
        with contextlib.suppress(NoValues):
            shape = quantised.shape(codes.shape, loader.stored)
            headers[name] = dataclasses.replace(codes, shape=shape, dtype=loader.dtype)
    return headers


@lru_cache(maxsize=16)
def _read_headers(folder: str, shards: tuple[str, ...]) -> Mapping[str, Header]:
    headers = {}
    for shard in shards:
        file = Path(folder) / shard
        with opened(file):  # raises if the file is not in this format
            values, entries = read_header(file)
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])
            shape = tuple(entry["shape"])
            headers[name] = Header(shape, dtype, file, values + first, last - first)
    return headers


WeightTask = tuple[WeightInfo, ExecuteMergeMethodTask]


def spans_of(tasks: Iterable[Task[Any]]) -> tuple[Span, ...]:
    """Byte ranges in safetensors files of the tensors that mergekit's tasks gather.

    Pickled tensors, and tensors that mergekit makes from others, are left out.
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
