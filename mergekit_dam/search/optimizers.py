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

    A model's coefficients in a tensor, the last dimension of a parameter, compete among
    themselves. Entries that stay keep their moments up to date. No weight decay.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, fraction: float) -> None:
        """The optimiser.

        Args:
            groups: torch's parameter groups, of parameters `[models, n]`, or `[n]`, each with
                its learning rate.
            fraction: of n that moves in a step, rounded down, but one at least. Entries whose
                momentum equals that of the last one chosen move too.
        """
        super().__init__(groups, weight_decay=0.0)
        self._fraction = fraction

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure does."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [parameter.clone() for parameter in parameters]
        loss = super().step(closure)
        for parameter, previous in zip(parameters, before, strict=True):
            if parameter in self.state:  # else it never had a gradient
                chosen = _largest(self.state[parameter]["exp_avg"].abs(), self._fraction)
                parameter.copy_(torch.where(chosen, parameter, previous))
        return loss


def _largest(magnitude: Tensor, fraction: float) -> Tensor:
    """Which entries are among the largest of their row; compared, not sorted, so ties are even."""
    count = max(1, int(fraction * magnitude.shape[-1]))
    return magnitude >= magnitude.topk(count, dim=-1).values[..., -1:]


def make_optimizer(groups: Iterable[dict[str, Any]], settings: RunParameters) -> Optimizer:
    """The optimiser, without weight decay, of parameters `[models, n]` (or `[n]`).

    Args:
        groups: torch's parameter groups, each with its learning rate.
    """
    if settings.optimizer == "mofo":
        return MoFO(groups, fraction=settings.mofo_fraction)
    return AdamW(groups, weight_decay=0.0)


def make_schedule(optimizer: Optimizer, settings: RunParameters, steps: int) -> LRScheduler:
    """Transformers' schedule of that name, to be stepped once after every one of the steps."""
    # Its "constant" would drop the warm-up without a word.
    constant = settings.lr_schedule == "constant"
    schedule: LRScheduler = get_scheduler(
        "constant_with_warmup" if constant else settings.lr_schedule,
        optimizer,
        num_warmup_steps=math.ceil(settings.warmup * steps),
        num_training_steps=steps,
    )
    return schedule
