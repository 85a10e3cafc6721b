"""The speed of this machine, measured in about two seconds."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mergekit_dam.estimate.gpus import FACTORISED, REACHED, Gpu
from mergekit_dam.fitting.costs import Speed
from mergekit_dam.fitting.tensor_cores import tensor_cores
from mergekit_dam.streams.stream import CHUNK_TOKENS

Clock = Callable[[], float]

_SECONDS = 0.25
"""Seconds that each measurement takes, after a first run that is not measured."""
_LARGEST = 2048
"""The most rows and columns of a matrix in a product that is measured."""
_FACTORISED = 1536
"""The most rows of a matrix whose factorisation is measured."""
_ELEMENTS = 2**22
"""Elements of a tensor in a pass that is measured."""
_PASS_BYTES = 18
"""Bytes that move for an element that is converted, scaled, and added to others."""
_FILE = 2**26
"""Bytes of the file that is written and read."""


@dataclass(frozen=True)
class Machine:
    """Speeds and sizes of a machine.

    Attributes:
        forward: flops per second of products of matrices in the dtype of the models' blocks.
        fp32, fp64: flops per second of products of matrices.
        cholesky: flops per second of a factorisation in fp32.
        elements: elements per second that are scaled and added to others.
        read, write: bytes per second of the disk where the merged model goes.
        memory: bytes of the host's memory.
        available: bytes of that memory that are free at the moment.
        disk: bytes that are free where the merged model goes.
        gpu: bytes of the GPU's memory, 0 without one.
        published: name of the GPU whose speeds are published ones; empty if they were measured.
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
    published: str = ""

    def speed(self, of: Speed) -> float:
        """Flops or elements per second of one kind of work."""
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
        hidden: features of the residual stream: products of small matrices are slower.
        inner: features of the widest linear.
        out_path: where the merged model would go; a file of 64 MB is written beside it and removed.
        device: the device of the fit.
        dtype: dtype of the products in the models' blocks.
        clock: tells the time in seconds.
    """
    hidden, inner = min(hidden, _LARGEST), min(inner, _LARGEST)
    speed = _Stopwatch(device, clock)

    def product(dtype: torch.dtype, rows: int) -> float:
        return speed.of_products(rows, hidden, inner, dtype)

    read, write = _disk_speed(existing_folder(out_path), clock)
    memory = psutil.virtual_memory()
    cuda = device.type == "cuda"
    with tensor_cores(dtype != torch.float32):  # as in a fit
        fp32 = product(torch.float32, CHUNK_TOKENS)
    return Machine(
        forward=fp32 if dtype == torch.float32 else product(dtype, CHUNK_TOKENS),
        fp32=fp32,
        fp64=product(torch.float64, hidden),
        cholesky=speed.of_factorisations(min(_FACTORISED, 3 * inner)),
        elements=speed.of_passes(),
        read=read,
        write=write,
        memory=memory.total,
        available=memory.available,
        disk=psutil.disk_usage(str(existing_folder(out_path))).free,
        gpu=torch.cuda.get_device_properties(device).total_memory if cuda else 0,
    )


def with_gpu(
    gpu: Gpu, out_path: Path, dtype: torch.dtype, clock: Clock = time.perf_counter
) -> Machine:
    """This machine with a GPU that it does not have, at a share of its published rates.

    Args:
        dtype: dtype of the products in the models' blocks.
        out_path, clock: as for `calibrate`.
    """
    folder, memory = existing_folder(out_path), psutil.virtual_memory()
    read, write = _disk_speed(folder, clock)
    fp32 = gpu.fp32 if dtype == torch.float32 else gpu.tf32
    return Machine(
        forward=REACHED * (gpu.fp32 if dtype == torch.float32 else gpu.bf16),
        fp32=REACHED * fp32,
        fp64=REACHED * gpu.fp64,
        cholesky=FACTORISED * gpu.fp32,
        elements=REACHED * gpu.bandwidth / _PASS_BYTES,
        read=read,
        write=write,
        memory=memory.total,
        available=memory.available,
        disk=psutil.disk_usage(str(folder)).free,
        gpu=int(gpu.memory),
        published=gpu.name,
    )


@dataclass(frozen=True)
class _Stopwatch:
    """Measures how much of some work a device does per second."""

    device: torch.device
    clock: Clock

    def of_products(self, rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
        """Flops per second of `[rows, inner] @ [inner, columns]`."""
        x = torch.ones(rows, inner, dtype=dtype, device=self.device)
        w = torch.ones(inner, columns, dtype=dtype, device=self.device)
        return self._rate(2 * rows * inner * columns, lambda: x @ w)

    def of_factorisations(self, size: int) -> float:
        """Flops per second of a Cholesky factorisation in fp32."""
        matrix = torch.eye(size, device=self.device) + 1e-3
        return self._rate(size**3 / 3, lambda: torch.linalg.cholesky(matrix))

    def of_passes(self) -> float:
        """Elements per second that are converted, scaled, and added to others."""
        half = torch.ones(_ELEMENTS, dtype=torch.bfloat16, device=self.device)
        total, scale = half.float(), torch.ones(_ELEMENTS, device=self.device)
        return self._rate(_ELEMENTS, lambda: total.addcmul_(half.float(), scale))

    def _rate(self, count: float, run: Callable[[], object]) -> float:
        run()  # the first run sets up threads and memory
        runs, began = 0, self._now()
        while (spent := self._now() - began) < _SECONDS:
            run()
            runs += 1
        return count * runs / spent

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def existing_folder(path: Path) -> Path:
    """The folder that a path is in, or would be in."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _disk_speed(folder: Path, clock: Clock) -> tuple[float, float]:
    """Bytes per second that are read and written; infinite where no file can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            began = clock()
            file.write(bytes(_FILE))
            file.flush()
            os.fsync(file.fileno())
            written = clock()
            if hasattr(os, "posix_fadvise"):  # otherwise it would be read from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            dropped = clock()
            while file.read(2**20):
                pass
            done = clock()
    except OSError:
        return float("inf"), float("inf")
    return _FILE / max(done - dropped, 1e-9), _FILE / max(written - began, 1e-9)
