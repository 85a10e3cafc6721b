"""The fit of the output head: a short gradient fit of the KL between logits.

For each model k, `KL(teacher k's distribution || merged)` on its data, at the configured
temperature; the merged head acts on the merged stream. The gradient with respect to the
merged weight is turned into that of the coefficients, `dL/dc_s = sum over rows of
W_s * dL/dW`, so that no autograd graph holds the weights of N models.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import coefficient_gradient
from mergekit_dam.coefficients.tensors import FittedTensor
from mergekit_dam.fitting.divergence import divergence
from mergekit_dam.fitting.evidence import Losses
from mergekit_dam.fitting.judged import judged
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.distributed import all_sum, all_sums
from mergekit_dam.streams.share import Split, judging_split
from mergekit_dam.streams.stream import Stream

STEPS = 60
LEARNING_RATE = 3e-2
JUDGE_EVERY = 15
"""Steps between two looks at the held-out loss; the best of them is kept."""


def fit_head(walk: Walk, unit: Unit, *, temperature: float) -> Iterator[tuple[str, FittedTensor]]:
    """Fit the coefficients of the head's weight (its bias keeps the average).

    Adam on the unknowns, one sequence of every model a step, in turn.

    Yields:
        (name relative to the part, fitted tensor).
    """
    started = time.perf_counter()
    name = unit.parameter("weight")
    head = walk.sources[name]
    form = head.settings.parametrisation
    whole = sum(head.settings.loss_weights[s.source] for s in walk.streams)
    columns = head.tensors[0].shape[unit.axis]
    size = columns if head.settings.granularity == "column" else 1
    unknowns = form.start[:, None].repeat(1, size).to(walk.device)
    optimizer = torch.optim.Adam([unknowns], lr=LEARNING_RATE)
    expand = form.expand.to(walk.device)

    judged_on = judging_split(stream.share for stream in walk.streams)

    def loss(coefficients: Tensor, split: Split) -> float:
        weight = head.merged(coefficients, axis=unit.axis).float()
        return _loss(walk, name, weight, split, temperature=temperature)

    best, best_step = form.coefficients(unknowns), 0
    lowest = start = loss(best, judged_on)
    for step in range(1, STEPS + 1):
        weight = head.merged(form.coefficients(unknowns), axis=unit.axis).float()
        weight.requires_grad_(True)
        for stream in walk.streams:
            share = head.settings.loss_weights[stream.source] / whole
            _backward(walk, stream, step - 1, name, weight, temperature, share)
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        unknowns.grad = expand.T @ all_sum(
            coefficient_gradient(head.tensors, own, axis=unit.axis, per_column=size > 1)
        )
        optimizer.step()
        if step % JUDGE_EVERY == 0:
            candidate = form.coefficients(unknowns)
            now = loss(candidate, judged_on)
            if now < lowest:
                best, lowest, best_step = candidate, now, step
    solver: dict[str, Any] = {"method": "adam", "iterations": best_step}
    yield (
        name,
        judged(
            head,
            "head",
            best,
            axis=unit.axis,
            before=Losses(loss(head.start(), "fit"), start),
            after=Losses(loss(best, "fit"), lowest),
            solver=solver,
            started=started,
        ),
    )


def _kl(
    walk: Walk,
    stream: Stream,
    teacher_weights: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    sequences: slice,
    temperature: float,
) -> Tensor:
    """KL in nats per token, averaged over the tokens of some sequences."""
    with torch.no_grad():
        teacher = walk.teachers[stream.source].run(
            teacher_weights, stream.teacher[sequences].to(walk.device)
        )
    merged = walk.part.run(weights, stream.merged[sequences].to(walk.device))
    return divergence(merged, teacher, temperature=temperature).mean()


def _backward(
    walk: Walk,
    stream: Stream,
    step: int,
    name: str,
    weight: Tensor,
    temperature: float,
    share: float,
) -> None:
    """Add one sequence's gradient to `weight.grad`, if the sequence is this process's."""
    index = stream.share.row_of(step % stream.share.count("fit"))
    if index is None:
        return
    with torch.enable_grad():
        weights = {**walk.weights, name: weight}
        loss = _kl(
            walk,
            stream,
            walk.teacher_weights(stream),
            weights,
            slice(index, index + 1),
            temperature,
        )
        (share * loss).backward()  # type: ignore[no-untyped-call]


def _loss(walk: Walk, name: str, weight: Tensor, split: Split, *, temperature: float) -> float:
    """KL of the merged model on a split, averaged over the models with their loss weights."""
    loss_weights = walk.sources[name].settings.loss_weights
    weights = {**walk.weights, name: weight}
    whole = sum(loss_weights[stream.source] for stream in walk.streams)
    loss = 0.0
    for stream in walk.streams:
        teacher_weights = walk.teacher_weights(stream)
        first, last = stream.share.rows(split)
        own = sum(
            float(_kl(walk, stream, teacher_weights, weights, slice(i, i + 1), temperature))
            for i in range(first, last)
        )
        loss += loss_weights[stream.source] / whole * own / stream.share.count(split)
    return all_sums([loss])[0]
