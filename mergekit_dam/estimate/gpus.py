"""Rates of GPUs as their makers publish them, for estimates of machines that are not at hand."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Published rates and sizes of a GPU.

    Attributes:
        name: what `--gpu` calls it.
        memory: bytes.
        bandwidth: bytes per second of that memory.
        fp32, fp64: flops per second without tensor cores.
        tf32, bf16: flops per second of tensor cores on dense matrices, with sums in fp32.
    """

    name: str
    memory: float
    bandwidth: float
    fp32: float
    fp64: float
    tf32: float
    bf16: float


_PUBLISHED = (
    Gpu("rtx3090", 24e9, 0.936e12, 35.6e12, 0.56e12, 35.6e12, 71e12),
    Gpu("rtx4090", 24e9, 1.008e12, 82.6e12, 1.29e12, 82.6e12, 165e12),
    Gpu("l40s", 48e9, 0.864e12, 91.6e12, 1.43e12, 183e12, 362e12),
    Gpu("a100", 80e9, 2.039e12, 19.5e12, 9.7e12, 156e12, 312e12),
    Gpu("h100", 80e9, 3.35e12, 67e12, 34e12, 494e12, 989e12),
    Gpu("h200", 141e9, 4.8e12, 67e12, 34e12, 494e12, 989e12),
)
"""From data sheets of NVIDIA: GA102 and AD102 architecture, L40S, A100 (80 GB, SXM), H100 and H200
(SXM)."""

GPUS = {gpu.name: gpu for gpu in _PUBLISHED}

REACHED = 0.4
"""Share of these rates that products of matrices of models of 7B reach, about."""

FACTORISED = 0.1
"""Share of the rate in fp32 that a factorisation reaches, about."""
