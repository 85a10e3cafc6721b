"""What this machine does in a second, tried out in about two."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mergekit_dam.fitting.costs import Speed
from mergekit_dam.streams.stream import CHUNK_TOKENS

Clock = Callable[[], float]

_SECONDS = 0.25
"""That each measurement goes on for, once it has been done once."""
_LARGEST = 2048
"""Rows and columns of a matrix that is tried out, at most."""
_FACTORISED = 1536
_ELEMENTS = 2**22
_FILE = 2**26


@dataclass(frozen=True)
class Machine:
    """Speeds and sizes.

    Attributes:
        forward: flops a second of products of matrices in the dtype of the models' blocks.
        fp32, fp64: flops a second of products of matrices.
        cholesky: flops a second of a factorisation in fp32.
        elements: weights a second that are scaled and added to others.
        read, write: bytes a second of the disk where the merged model goes.
        memory: bytes of the host, and `available` of them at the moment.
        disk: bytes that are free where the merged model goes.
        gpu: bytes of the accelerator, 0 without one.
    """

    forward: float
    fp32: float
    fp64: float
    cholesky: float
    elements: float
    read: float
    write: float
    memory: int
    available: int
    disk: int
    gpu: int = 0

    def speed(self, of: Speed) -> float:
        """Of one kind of work, a second."""
        return {
            "forward": self.forward,
            "fp32": self.fp32,
            "fp64": self.fp64,
            "cholesky": self.cholesky,
            "elements": self.elements,
        }[of]


def calibrate(
    hidden: int,
    inner: int,
    out_path: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    clock: Clock = time.perf_counter,
) -> Machine:
    """Measure this machine.

    Args:
        hidden, inner: features of the residual stream and of the widest linear: products of small
            matrices are slower.
        out_path: where the merged model would go; a file of 64 MB is written beside it and removed.
        dtype: of products in the models' blocks.
        clock: seconds.
    """
    hidden, inner = min(hidden, _LARGEST), min(inner, _LARGEST)

    def rate(count: float, run: Callable[[], object]) -> float:
        run()  # the first run sets up threads and memory
        runs, began = 0, _now(clock, device)
        while (spent := _now(clock, device) - began) < _SECONDS:
            run()
            runs += 1
        return count * runs / spent

    def product(dtype: torch.dtype, rows: int) -> float:
        x = torch.ones(rows, hidden, dtype=dtype, device=device)
        w = torch.ones(hidden, inner, dtype=dtype, device=device)
        return rate(2 * x.numel() * inner, lambda: x @ w)

    size = min(_FACTORISED, 3 * inner)
    matrix = torch.eye(size, device=device) + 1e-3
    half = torch.ones(_ELEMENTS, dtype=torch.bfloat16, device=device)
    total, scale = half.float(), torch.ones(_ELEMENTS, device=device)
    read, write = _disk_speed(existing_folder(out_path), clock)
    memory = psutil.virtual_memory()
    cuda = device.type == "cuda"
    fp32 = product(torch.float32, CHUNK_TOKENS)
    return Machine(
        forward=fp32 if dtype == torch.float32 else product(dtype, CHUNK_TOKENS),
        fp32=fp32,
        fp64=product(torch.float64, hidden),
        cholesky=rate(size**3 / 3, lambda: torch.linalg.cholesky(matrix)),
        elements=rate(_ELEMENTS, lambda: total.addcmul_(half.float(), scale)),
        read=read,
        write=write,
        memory=memory.total,
        available=memory.available,
        disk=psutil.disk_usage(str(existing_folder(out_path))).free,
        gpu=torch.cuda.get_device_properties(device).total_memory if cuda else 0,
    )


def _now(clock: Clock, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def existing_folder(path: Path) -> Path:
    """The folder that a path is in, or would be in."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _disk_speed(folder: Path, clock: Clock) -> tuple[float, float]:
    """Bytes read and written a second; not measured where the folder takes no file."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            began = clock()
            file.write(bytes(_FILE))
            file.flush()
            os.fsync(file.fileno())
            written = clock()
            if hasattr(os, "posix_fadvise"):  # or it would come from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            dropped = clock()
            while file.read(2**20):
                pass
            done = clock()
    except OSError:
        return float("inf"), float("inf")
    return _FILE / max(done - dropped, 1e-9), _FILE / max(written - began, 1e-9)
