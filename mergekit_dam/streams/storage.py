"""Where hidden states are kept: on the device of the fit, on the host, or on disk.

The rules (`stream_location`, `outputs_location`, `has_room`) are functions of plain sizes, so that
the estimate of a merge decides as the merge does. `Storage` holds the outcome and does the work.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mergekit_dam.choices import Offload
from mergekit_dam.streams.memory import is_gpu, memory_of

Location = Literal["device", "host", "disk"]

SHARE = 0.25
"""Fraction of a memory, or of a disk's free space, that one kind of hidden states may fill."""

IDLE = 0.125
"""Fraction of a GPU's memory that one kind of tensors may fill that is not in use."""


def stream_bytes(hidden: int, tokens: int) -> int:
    """Bytes of the fp32 hidden states of so many tokens."""
    return 4 * hidden * tokens


def streams_bytes(hidden: int, tokens: int) -> int:
    """Bytes of the hidden states that a sweep of layer fits holds at a time.

    Every token has a hidden state in its teacher's stream and one in the merged stream. A third
    one leaves a part while the other two still enter it.
    """
    return 3 * stream_bytes(hidden, tokens)


def boundary_bytes(hidden: int, tokens: int) -> int:
    """Bytes of the hidden states that a sweep of layer fits keeps on the disk for a next run.

    Both streams behind a block are written before those behind an earlier one are removed.
    """
    return 2 * 2 * stream_bytes(hidden, tokens)


def has_room(size: float, whole: float) -> bool:
    """Whether hidden states of `size` bytes may be kept in a memory of `whole` bytes."""
    return size <= SHARE * whole


def may_stay(size: float, whole: float) -> bool:
    """Whether weights, sums or metrics of `size` bytes stay on a device between their uses.

    Else they are on the host, and what is used is copied. It costs little time: each is used a few
    times per block.

    Args:
        whole: bytes of the device's memory.
    """
    return size <= IDLE * whole


def stream_location(offload: Offload, size: int, *, gpu: int, host: int) -> Location:
    """Where streams are kept: as near to the device of the fit as there is room for them.

    The rule goes by how much memory there is, not by how much is free at the moment, so that
    every run decides alike.

    Args:
        size: bytes of all streams together.
        gpu: bytes of the GPU that fits, 0 without one.
        host: bytes of the host's memory.
    """
    if offload != "auto":
        return offload
    if gpu and has_room(size, gpu):
        return "device"
    return "host" if has_room(size, host) else "disk"


def outputs_location(offload: Offload, *, gpu: bool) -> Location:
    """Where outputs of units are kept while their part is fitted, if there is room for them.

    On a GPU they stay there: computing them again is faster than moving them. On a CPU they go to
    files, which the system keeps in memory as long as nothing else needs it.

    Args:
        gpu: whether a GPU fits.
    """
    if offload != "auto":
        return offload
    return "device" if gpu else "disk"


class TensorFile:
    """A file of fp32 tensors, each appended to it. It has no name, and goes with the object."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the object)
        weakref.finalize(self, self._file.close)

    def append(self, tensor: Tensor) -> "DiskTensor":
        """Write a tensor `[sequences, ...]`, and return the object that reads it again."""
        start = self._file.seek(0, 2)
        tensor.float().cpu().contiguous().numpy().tofile(self._file)
        return DiskTensor(self, tensor.shape, start)

    def read(self, start: int, count: int) -> Tensor:
        """Read `count` numbers, fp32 `[count]`, beginning at the byte `start`."""
        self._file.seek(start)
        return torch.from_numpy(np.fromfile(self._file, dtype=np.float32, count=count))


class DiskTensor:
    """Hidden states fp32 `[sequences, length, hidden]` in a file; indexing reads some of them.

    Args:
        start: the byte where they begin.
    """

    dtype = torch.float32

    def __init__(self, file: TensorFile, shape: torch.Size, start: int = 0) -> None:
        self._file, self._start = file, start
        self.shape = shape

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Read some sequences: a consecutive slice, or those whose numbers an int64 tensor has."""
        if isinstance(index, Tensor):
            return torch.cat([self[:0], *(self[i : i + 1] for i in index.tolist())])
        first, last, step = index.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"required consecutive sequences, got {index}")
        count = self.shape[1:].numel() * max(last - first, 0)
        return self._file.read(self._byte(first), count).reshape(-1, *self.shape[1:])

    def narrow(self, dim: int, start: int, length: int) -> "DiskTensor":
        """A view of `length` sequences from `start` on, like `Tensor.narrow` in dimension 0."""
        if dim != 0:
            raise IndexError(f"required the first dimension, got {dim}")
        return DiskTensor(self._file, torch.Size((length, *self.shape[1:])), self._byte(start))

    def _byte(self, sequence: int) -> int:
        return self._start + 4 * self.shape[1:].numel() * sequence


Sequences = Tensor | DiskTensor
"""Token ids or hidden states `[sequences, length, ...]`."""


class Storage:
    """Keeps the hidden states that leave a part, and says where outputs of its units are kept.

    Args:
        place: where hidden states that leave a part are kept until the next part has run.
        outputs: where outputs of units are kept while their part is fitted.
        folder: a folder on the disk to use; None for the system's folder of temporary files.
        device: the device of the fit; None for the CPU.
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

    def kept_again(self, x: Tensor, chunks: Iterable[slice]) -> Sequences:
        """Hidden states of an earlier run, kept where this run keeps them.

        Args:
            x: hidden states `[sequences, length, hidden]`, mapped from a file.
            chunks: slices of the sequences, in order.
        """
        device = self._device if self.place == "device" else torch.device("cpu")
        return self.keep((x[chunk].to(device) for chunk in chunks), len(x))

    def keep(self, chunks: Iterable[Tensor], count: int) -> Sequences:
        """Keep `count` sequences that come in chunks `[some sequences, length, hidden]`."""
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
        """Whether there is room for `size` bytes of units' outputs where those are kept."""
        return has_room(size, _capacity(self.outputs, self._device, self.folder))


def choose_storage(offload: Offload, size: int, device: torch.device, folder: Path) -> Storage:
    """The storage for streams of `size` bytes on this machine.

    Args:
        offload: where the user wants them, or "auto".
        device: the device of the fit.
        folder: a folder on the disk to use.
    """
    gpu = memory_of(device) if is_gpu(device) else 0
    host = memory_of(torch.device("cpu"))
    return Storage(
        stream_location(offload, size, gpu=gpu, host=host),
        outputs_location(offload, gpu=gpu > 0),
        folder,
        device,
    )


def _capacity(location: Location, device: torch.device, folder: Path | None) -> int:
    """Bytes of a memory, or bytes that are free on the disk."""
    if location == "disk":
        return shutil.disk_usage(folder or tempfile.gettempdir()).free
    return memory_of(device if location == "device" else torch.device("cpu"))
