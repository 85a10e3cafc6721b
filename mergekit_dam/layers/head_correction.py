"""The correction of the output head: factors of low rank that descend beside its coefficients.

Its loss is no quadratic, so that there is no closed form. The head's weight is `W + left @ right`.
At the start `left` is 0 and `right` is random, of such a size that what it makes of a token is
about 1: one learning rate then suits models of any width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction, out_by_in, saves_room
from mergekit_dam.coefficients.tensors import FittedTensor
from mergekit_dam.layers.head_loss import HeadLoss, descent, lowest
from mergekit_dam.streams.distributed import all_sum, all_sums, from_first

STEPS = 240
LEARNING_RATES = (1e-2, 1e-1)
"""Of the left factor, whose unit is nats, and of the right one, relative to its size."""


def correct_head(loss: HeadLoss, fitted: FittedTensor, done: float = 0.0) -> FittedTensor:
    """Add a correction to a fitted head, if that lowers the held-out loss.

    Args:
        loss: the loss of the head.
        fitted: the head after the fit of its columns, whether that was kept or not.
        done: share of the fit of the head that is done.
    """
    axis, settings = fitted.axis, fitted.sources.settings
    weight = out_by_in(fitted.merged, axis).float()
    left = torch.zeros(len(weight), min(settings.correction_rank, *weight.shape)).to(weight)
    random = torch.Generator().manual_seed(0)  # drawn on the host: alike on every device
    right = torch.randn(left.shape[1], weight.shape[1], generator=random).to(weight)
    unit = 1 / (weight.shape[1] * _mean_square(loss)) ** 0.5
    rates = zip((left, right), LEARNING_RATES, strict=True)
    optimizer = torch.optim.Adam([{"params": [own], "lr": rate} for own, rate in rates])

    def gradients(number: int) -> None:
        moved = torch.addmm(weight, left, right, alpha=unit)
        own = out_by_in(loss.gradient(out_by_in(moved, axis), number), axis)
        left.grad, right.grad = all_sum(unit * (own @ right.T)), all_sum(unit * (left.T @ own))

    def candidate() -> Correction:
        scaled = unit * right
        # Machines may differ in the last bits of a solution; the merged model must not.
        return from_first(
            lambda: (
                Correction(left=left.clone(), right=scaled)
                if settings.correction == "low_rank" and saves_room(weight.shape, len(right))
                else Correction(full=left @ scaled)
            ).cpu()
        )

    def merged(correction: Correction) -> Tensor:
        return fitted.sources.merged(fitted.coefficients, axis=axis, correction=correction)

    report = fitted.report
    start = report.held_out_fitted if report.outcome == "fitted" else report.held_out_start
    assert start is not None
    looks = descent(optimizer, loss.steps(STEPS), gradients, (done, 1.0))
    best = lowest(loss, start, looks, candidate, merged)
    said: dict[str, Any] = {"outcome": "dropped: held-out loss was not better"}
    correction = best.point
    if correction is not None:
        kind = "full" if correction.left is None else "low rank"
        said = {"outcome": kind, "steps": best.step, "held_out": best.loss}
        if correction.left is not None:
            said["rank"] = len(right)
    said["held_out_start"] = start
    fitted = replace(fitted, report=replace(report, correction=said))
    if correction is None:
        return fitted
    return replace(fitted, merged=merged(correction), correction=correction)


def _mean_square(loss: HeadLoss) -> float:
    """Mean square of what enters the head, on the first sequence of every model.

    It is that of the tokens that count, or of all where none does.
    """
    walk, name = loss.walk, loss.unit.name
    total = count = 0.0
    for stream in walk.streams:
        row = stream.share.row_of(0)
        if row is None:
            continue  # another process has the sequence
        tokens, weight = stream.counted_tokens(row)
        x = stream.merged[row : row + 1][:, tokens if weight else slice(None)].to(walk.device)
        seen = walk.part.captured(walk.weights, x, inputs=(name,)).inputs[name]
        total += float(seen.double().square().mean())
        count += 1
    total, count = all_sums([total, count])
    return max(total / count, 1e-30)
