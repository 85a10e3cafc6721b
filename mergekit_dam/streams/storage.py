"""Where hidden states are kept: on the device of the fit, on the host, or on disk."""

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mergekit_dam.parameters import Offload
from mergekit_dam.streams.memory import memory_of

Location = Literal["device", "host", "disk"]

SHARE = 0.25
"""Part of a memory, or of a disk's free space, that one kind of hidden states may fill."""


class TensorFile:
    """A file that tensors are appended to, fp32. It has no name, and is gone with the object."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the object)
        weakref.finalize(self, self._file.close)

    def append(self, tensor: Tensor) -> "DiskTensor":
        """Write a tensor `[sequences, ...]`; what reads it again."""
        start = self._file.seek(0, 2)
        tensor.float().cpu().contiguous().numpy().tofile(self._file)
        return DiskTensor(self, tensor.shape, start)

    def read(self, start: int, count: int) -> Tensor:
        """So many numbers from a byte on, fp32 `[count]`."""
        self._file.seek(start)
        return torch.from_numpy(np.fromfile(self._file, dtype=np.float32, count=count))


class DiskTensor:
    """Hidden states fp32 `[sequences, length, hidden]` in a file; what is asked for is read.

    Args:
        start: byte where they begin.
    """

    def __init__(self, file: TensorFile, shape: torch.Size, start: int = 0) -> None:
        self._file, self._start = file, start
        self.shape = shape

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Some of the sequences: consecutive ones, or those of an int64 tensor of numbers."""
        if isinstance(index, Tensor):
            return torch.cat([self[:0], *(self[i : i + 1] for i in index.tolist())])
        first, last, step = index.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"required consecutive sequences, got {index}")
        count = self.shape[1:].numel() * max(last - first, 0)
        return self._file.read(self._byte(first), count).reshape(-1, *self.shape[1:])

    def narrow(self, dim: int, start: int, length: int) -> "DiskTensor":
        """The same file's sequences from `start`; as of a tensor, along its first dimension."""
        if dim != 0:
            raise IndexError(f"required the first dimension, got {dim}")
        return DiskTensor(self._file, torch.Size((length, *self.shape[1:])), self._byte(start))

    def _byte(self, sequence: int) -> int:
        return self._start + 4 * self.shape[1:].numel() * sequence


Sequences = Tensor | DiskTensor
"""Token ids or hidden states `[sequences, length, ...]`."""


class Storage:
    """Keeps what leaves a part, and what its units put out.

    Args:
        place: of what leaves a part, until the next part has run.
        outputs: of what units put out, while their part is fitted.
        folder: on the disk to use.
        device: of the fit.
    """

    def __init__(
        self,
        place: Location = "host",
        outputs: Location = "host",
        folder: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.place, self.outputs, self.folder = place, outputs, folder
        self._device = device or torch.device("cpu")

    def keep(self, chunks: Iterable[Tensor], count: int) -> Sequences:
        """Put the chunks `[some sequences, length, hidden]` of `count` sequences together."""
        if self.place == "disk":
            return self._write(chunks, count)
        kept: Tensor | None = None
        done = 0
        for chunk in chunks:
            if kept is None:
                device = chunk.device if self.place == "device" else torch.device("cpu")
                kept = torch.empty(count, *chunk.shape[1:], dtype=chunk.dtype, device=device)
            kept[done : done + len(chunk)] = chunk
            done += len(chunk)
        assert kept is not None
        assert done == count
        return kept

    def _write(self, chunks: Iterable[Tensor], count: int) -> DiskTensor:
        file = TensorFile(self.folder)
        shapes = [file.append(chunk).shape for chunk in chunks]
        return DiskTensor(file, torch.Size((count, *shapes[0][1:])))

    def has_room_for_outputs(self, size: int) -> bool:
        """Whether so many bytes of what units put out are to be kept."""
        return size <= room(self.outputs, self._device, self.folder)


def room(place: Location, device: torch.device, folder: Path | None) -> float:
    """Bytes of one kind of hidden states that are to be kept in a place."""
    if place == "disk":
        return SHARE * shutil.disk_usage(folder or tempfile.gettempdir()).free
    return SHARE * memory_of(device if place == "device" else torch.device("cpu"))


def choose_storage(offload: Offload, size: int, device: torch.device, folder: Path) -> Storage:
    """The storage of streams of `size` bytes: the nearest to the device that has room.

    Going by what memory there is, not by what is free at the moment: the same on every run. What
    units put out stays on a GPU if it has room; computing it again is faster there than moving
    it. From a CPU it goes to files, which the system keeps in memory that nobody else needs.
    """
    if offload != "auto":
        return Storage(offload, offload, folder, device)
    outputs: Location = "device" if device.type == "cuda" else "disk"
    if device.type == "cuda" and size <= room("device", device, folder):
        return Storage("device", outputs, folder, device)
    place: Location = "host" if size <= room("host", device, folder) else "disk"
    return Storage(place, outputs, folder, device)
