"""The optimiser Muon (https://kellerjordan.github.io/posts/muon): orthogonalised momentum.

torch has it since version 2.9, in bfloat16. This one works with all torch versions that mergekit
supports, uses fp32, and gives equal bits on equal machines.
"""

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic that drives singular values towards 1


class Muon(torch.optim.Optimizer):
    """Optimiser for two-dimensional weights inside a network; use AdamW for all other weights."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with Nesterov momentum and decoupled weight decay."""
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalised(weight.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix with all singular values near 1, by Newton-Schulz iteration.

    Args:
        matrix: `[rows, columns]`; not changed.
        steps: Number of iterations.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide: torch.Tensor = matrix.mT if tall else matrix  # its Gram matrix is the smaller one
    x: torch.Tensor = wide / wide.norm().clamp_min(1e-7)  # a zero gradient has norm 0
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
