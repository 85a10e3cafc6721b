"""The fit of the output head: a short descent of the KL between logits.

First the coefficients of its columns descend; then, where a correction is asked for, factors of low
rank beside them (`head_correction`). The gradient with respect to the merged weight is converted to
that of the coefficients, `dL/dc_s = sum over rows of W_s * dL/dW`, so that no autograd graph holds
the weights of N models.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import coefficient_gradient
from mergekit_dam.coefficients.tensors import FittedTensor
from mergekit_dam.fitting.evidence import Losses
from mergekit_dam.fitting.judged import judged
from mergekit_dam.layers import head_correction
from mergekit_dam.layers.head_loss import HeadLoss, descent, lowest
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.distributed import all_sum

STEPS = 240
ROUGH_STEPS = 60
"""Steps where a correction follows: it repairs what they leave."""

LEARNING_RATE = 3e-2


def column_steps(corrected: bool) -> int:
    """Steps of the columns' descent, at most."""
    return ROUGH_STEPS if corrected else STEPS


def fit_head(walk: Walk, unit: Unit, *, temperature: float) -> Iterator[tuple[str, FittedTensor]]:
    """Fit the head's weight (its bias keeps the average).

    Each step uses tokens of one sequence of every model, in turn.

    Yields:
        (name relative to the part, fitted tensor).
    """
    loss = HeadLoss(walk, unit, temperature)
    corrected = loss.sources.settings.correction != "none"
    share = ROUGH_STEPS / (ROUGH_STEPS + head_correction.STEPS) if corrected else 1.0
    fitted = _fit_columns(loss, share)
    if corrected:
        fitted = head_correction.correct_head(loss, fitted, share)
    yield loss.name, fitted


def _fit_columns(loss: HeadLoss, share: float) -> FittedTensor:
    """Fit the coefficients, a share of the fit of the head: Adam minimises over the unknowns."""
    started = time.perf_counter()
    sources, axis = loss.sources, loss.unit.axis
    form = sources.settings.parametrisation
    per_column = sources.settings.granularity == "column"
    size = sources.tensors[0].shape[axis] if per_column else 1
    unknowns = form.start[:, None].repeat(1, size).to(loss.walk.device)
    expand = form.expand.to(unknowns)
    optimizer = torch.optim.Adam([unknowns], lr=LEARNING_RATE)

    def merged(coefficients: Tensor) -> Tensor:
        return sources.merged(coefficients, axis=axis)

    def gradients(number: int) -> None:
        # Chain rule through `coefficients = offset + expand @ unknowns`.
        own = loss.gradient(merged(form.coefficients(unknowns)), number)
        found = coefficient_gradient(sources.tensors, own, axis=axis, per_column=per_column)
        unknowns.grad = expand.T @ all_sum(found)

    average = form.coefficients(unknowns)
    start = loss.of(merged(average))
    most = column_steps(sources.settings.correction != "none")
    steps = 0 if sources.identical else loss.steps(most)  # no coefficients would change it
    looks = descent(optimizer, steps, gradients, (0.0, share))
    best = lowest(loss, start, looks, lambda: form.coefficients(unknowns), merged)
    solver: dict[str, Any] = {"method": "adam", "iterations": best.step}
    return judged(
        sources,
        "head",
        average if best.point is None else best.point,
        axis=axis,
        before=_losses(loss, start),
        after=_losses(loss, best.loss),
        solver=solver,
        started=started,
    )


def _losses(loss: HeadLoss, judged: float) -> Losses:
    """A loss on the data that judges; on the data of the fit, if that is another, it is unknown."""
    return Losses(judged if loss.judging == "fit" else None, judged)
