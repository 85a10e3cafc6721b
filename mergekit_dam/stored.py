"""Files that are on the disk as a whole or not at all, and the headers of safetensors files."""

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergekit_dam.untrusted import parsed_json

DTYPES = {
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
"""Dtypes that a merge reads and writes, by their names in safetensors."""

LONGEST_HEADER = 100_000_000
"""Bytes of the largest header that safetensors reads."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file atomically: a reader sees the whole file or none, after a power cut as well.

    Yields:
        A temporary path to write to, which gets the file's name when the body ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, and in the folders in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the values of a safetensors file begin, and its header's entry of each tensor.

    Every entry has a `dtype` (a text), a `shape` (whole numbers), and `data_offsets` inside of the
    file.

    Raises:
        ValueError: The file has no such header.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(f"its header cannot have {length:,} bytes")
        entries = parsed_json(opened.read(length))
    if not isinstance(entries, dict):
        raise ValueError("its header is no object")
    entries.pop("__metadata__", None)
    wrong = [name for name, own in entries.items() if not _is_entry(own, size - 8 - length)]
    if wrong:
        raise ValueError(f"the entry of {wrong[0]!r:.80} in its header is damaged")
    return 8 + length, entries


def _is_entry(entry: Any, size: int) -> bool:
    """Whether a value of a header describes a tensor whose values are among `size` bytes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets", [])
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        return False
    return bool(offsets[0] <= offsets[1] <= size)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(own) is int and own >= 0 for own in value)


def tensors_header(
    entries: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The beginning of a safetensors file, behind which the values follow without gaps.

    Args:
        entries: name, dtype and shape of every tensor, in the order of the values.
        metadata: text to keep in the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    size = 0
    for name, dtype, shape in entries:
        end = size + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text
