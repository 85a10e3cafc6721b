"""Where streams of hidden states are kept: on the device of the fit, on the host, or on disk."""

import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

StreamPlace = Literal["device", "host", "disk"]
Offload = Literal["auto", "device", "host", "disk"]

SHARE = 0.25
"""Part of a memory that the streams may fill; beyond it they move on to the next larger one."""


class OnDisk:
    """Hidden states fp32 `[sequences, length, hidden]` in a file; what is asked for is read.

    The file has no name, and is gone with the object, or with the process.

    Args:
        first: of the file's sequences.
        whole: the object that this is a part of, which owns the file.
    """

    def __init__(
        self, file: IO[bytes], shape: torch.Size, first: int = 0, whole: "OnDisk | None" = None
    ) -> None:
        self._file, self._first, self._whole = file, first, whole
        self.shape = shape
        if whole is None:
            weakref.finalize(self, file.close)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Some of the sequences: consecutive ones, or those of an int64 tensor of numbers."""
        if isinstance(index, Tensor):
            return torch.cat([self[:0], *(self[i : i + 1] for i in index.tolist())])
        first, last, step = index.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"required consecutive sequences, got {index}")
        size = self.shape[1:].numel()
        self._file.seek(4 * size * (self._first + first))
        read = np.fromfile(self._file, dtype=np.float32, count=size * max(last - first, 0))
        return torch.from_numpy(read).reshape(-1, *self.shape[1:])

    def narrow(self, dim: int, start: int, length: int) -> "OnDisk":
        """The same file's sequences from `start`; as of a tensor, along its first dimension."""
        if dim != 0:
            raise IndexError(f"required the first dimension, got {dim}")
        shape = torch.Size((length, *self.shape[1:]))
        return OnDisk(self._file, shape, self._first + start, self._whole or self)


Sequences = Tensor | OnDisk
"""Token ids or hidden states `[sequences, length, ...]`."""


class Storage:
    """Keeps what leaves a part, chunk by chunk.

    Args:
        place: where.
        folder: on the disk to use.
    """

    def __init__(self, place: StreamPlace = "host", folder: Path | None = None) -> None:
        self.place, self._folder = place, folder

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

    def _write(self, chunks: Iterable[Tensor], count: int) -> OnDisk:
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with the object)
        shape: torch.Size | None = None
        for chunk in chunks:
            shape = chunk.shape[1:]
            chunk.float().cpu().contiguous().numpy().tofile(file)
        assert shape is not None
        return OnDisk(file, torch.Size((count, *shape)))


def choose_storage(offload: Offload, size: int, device: torch.device, folder: Path) -> Storage:
    """The storage of streams of `size` bytes: the nearest to the device that has room.

    Going by what memory there is, not by what is free at the moment: the same on every run.
    """
    if offload != "auto":
        return Storage(offload, folder)
    if (
        device.type == "cuda"
        and size <= SHARE * torch.cuda.get_device_properties(device).total_memory
    ):
        return Storage("device", folder)
    if size <= SHARE * psutil.virtual_memory().total:
        return Storage("host", folder)
    return Storage("disk", folder)
