"""Optimiser and learning-rate schedule of the end-to-end fit."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from mergekit_dam.parameters import RunParameters


class MoFO(AdamW):
    """AdamW whose step moves only the entries of largest momentum (arXiv 2407.20999).

    Entries compete within the last dimension of a parameter: one model's coefficients in one
    tensor. The moments of entries that do not move are still updated. No weight decay.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, fraction: float) -> None:
        """The optimiser.

        Args:
            groups: torch's parameter groups, of parameters `[models, n]` or `[n]`, each with its
                learning rate.
            fraction: fraction of the n entries that move in a step, rounded down to a number of
                entries, at least one. Entries with the momentum of the last chosen one move too.
        """
        super().__init__(groups, weight_decay=0.0)
        self._fraction = fraction

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's result."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [parameter.clone() for parameter in parameters]
        loss = super().step(closure)
        for parameter, previous in zip(parameters, before, strict=True):
            if parameter in self.state:  # else it never had a gradient
                chosen = _largest(self.state[parameter]["exp_avg"].abs(), self._fraction)
                parameter.copy_(torch.where(chosen, parameter, previous))
        return loss


def _largest(magnitude: Tensor, fraction: float) -> Tensor:
    """Which entries are among the largest of their row; a comparison, so all ties are in."""
    count = max(1, int(fraction * magnitude.shape[-1]))
    return magnitude >= magnitude.topk(count, dim=-1).values[..., -1:]


def make_optimizer(groups: Iterable[dict[str, Any]], settings: RunParameters) -> Optimizer:
    """The optimiser, without weight decay, of parameters `[models, n]` (or `[n]`).

    Args:
        groups: torch's parameter groups, each with its learning rate.
        settings: parameters of the merge.
    """
    if settings.optimizer == "mofo":
        return MoFO(groups, fraction=settings.mofo_fraction)
    return AdamW(groups, weight_decay=0.0)


def make_schedule(optimizer: Optimizer, settings: RunParameters, steps: int) -> LRScheduler:
    """Transformers' schedule of the configured name; call its `step` once after every step."""
    # transformers' "constant" would silently ignore the warm-up.
    constant = settings.lr_schedule == "constant"
    schedule: LRScheduler = get_scheduler(
        "constant_with_warmup" if constant else settings.lr_schedule,
        optimizer,
        num_warmup_steps=math.ceil(settings.warmup * steps),
        num_training_steps=steps,
    )
    return schedule
