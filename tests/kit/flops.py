"""Counts the flops that torch computes.

torch's own FlopCounterMode breaks `autograd.grad`, so a mode of this file counts with its formulas.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    # torch's registry has these kernels of the CPU under other names, or not at all.
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
    aten.linalg_cholesky_ex: lambda matrix, *_: matrix.numel() * matrix.shape[-1] // 3,
    aten.cholesky_solve: lambda right, *_: 2 * right.numel() * right.shape[0],
    aten.linalg_solve_triangular: lambda factor, right, **_: right.numel() * factor.shape[-1],
}


class CountedFlops(TorchDispatchMode):
    """Counts products of matrices, attention and factorisations while the body runs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _FORMULAS:
            self.total += _FORMULAS[packet](*args)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out
