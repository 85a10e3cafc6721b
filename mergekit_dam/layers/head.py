"""The fit of the output head: a short gradient fit of the KL between logits.

The loss is `KL(teacher k's distribution || merged)` on the data of each model k, at the configured
temperature. The merged head acts on the merged stream. The gradient with respect to the merged
weight is converted to the gradient of the coefficients, `dL/dc_s = sum over rows of W_s * dL/dW`,
so that no autograd graph holds the weights of N models.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import coefficient_gradient
from mergekit_dam.coefficients.tensors import FittedTensor, TensorSources
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
"""Steps between two evaluations of the held-out loss; the best coefficients are kept."""


def fit_head(walk: Walk, unit: Unit, *, temperature: float) -> Iterator[tuple[str, FittedTensor]]:
    """Fit the coefficients of the head's weight (its bias keeps the average).

    Adam minimises over the unknowns. Each step uses one sequence of every model, in turn.

    Yields:
        (name relative to the part, fitted tensor).
    """
    started = time.perf_counter()
    head = _Head(walk, unit, temperature)
    form = head.sources.settings.parametrisation
    unknowns = form.start[:, None].repeat(1, head.size).to(walk.device)
    optimizer = torch.optim.Adam([unknowns], lr=LEARNING_RATE)
    expand = form.expand.to(walk.device)
    judged_on = judging_split(stream.share for stream in walk.streams)

    best, best_step = form.coefficients(unknowns), 0
    lowest = start = head.loss(best, judged_on)
    for step in range(1, STEPS + 1):
        # Chain rule through `coefficients = offset + expand @ unknowns`.
        unknowns.grad = expand.T @ head.gradient(form.coefficients(unknowns), step - 1)
        optimizer.step()
        if step % JUDGE_EVERY == 0:
            candidate = form.coefficients(unknowns)
            now = head.loss(candidate, judged_on)
            if now < lowest:
                best, lowest, best_step = candidate, now, step
    solver: dict[str, Any] = {"method": "adam", "iterations": best_step}
    fitted = judged(
        head.sources,
        "head",
        best,
        axis=unit.axis,
        before=Losses(head.loss(head.sources.start(), "fit"), start),
        after=Losses(head.loss(best, "fit"), lowest),
        solver=solver,
        started=started,
    )
    yield head.name, fitted


@dataclass(frozen=True)
class _Head:
    """The head's weight at given coefficients, and the KL that results."""

    walk: Walk
    unit: Unit
    temperature: float

    @property
    def name(self) -> str:
        """Name of the weight, relative to the part."""
        return self.unit.parameter("weight")

    @property
    def sources(self) -> TensorSources:
        return self.walk.sources[self.name]

    @property
    def size(self) -> int:
        """Coefficients per source."""
        per_column = self.sources.settings.granularity == "column"
        return self.sources.tensors[0].shape[self.unit.axis] if per_column else 1

    def loss(self, coefficients: Tensor, split: Split) -> float:
        """KL on a split, averaged over the models with their loss weights."""
        weights = {**self.walk.weights, self.name: self._weight(coefficients)}
        loss = 0.0
        for stream in self.walk.streams:
            teacher_weights = self.walk.teacher_weights(stream)
            own = sum(
                float(self._kl(stream, teacher_weights, weights, row))
                for row in range(*stream.share.rows(split))
            )
            loss += self._weight_of(stream) * own / stream.share.count(split)
        return all_sums([loss])[0]

    def gradient(self, coefficients: Tensor, number: int) -> Tensor:
        """Gradient of the KL with respect to the coefficients, fp64, on one sequence per model.

        Args:
            coefficients: the coefficients, as for `loss`.
            number: number of the sequence in the data of the fit; it wraps around at the end.
        """
        weight = self._weight(coefficients).requires_grad_(True)
        for stream in self.walk.streams:
            row = stream.share.row_of(number % stream.share.count("fit"))
            if row is None:
                continue  # another process has the sequence
            with torch.enable_grad():
                weights = {**self.walk.weights, self.name: weight}
                loss = self._kl(stream, self.walk.teacher_weights(stream), weights, row)
                (self._weight_of(stream) * loss).backward()  # type: ignore[no-untyped-call]
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return all_sum(
            coefficient_gradient(
                self.sources.tensors, own, axis=self.unit.axis, per_column=self.size > 1
            )
        )

    def _weight(self, coefficients: Tensor) -> Tensor:
        return self.sources.merged(coefficients, axis=self.unit.axis).float()

    def _weight_of(self, stream: Stream) -> float:
        """Share of a stream's data in the loss."""
        weights = self.sources.settings.loss_weights
        return weights[stream.source] / sum(weights[own.source] for own in self.walk.streams)

    def _kl(
        self,
        stream: Stream,
        teacher_weights: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        row: int,
    ) -> Tensor:
        """KL in nats per token, averaged over the tokens of one sequence."""
        device, rows = self.walk.device, slice(row, row + 1)
        with torch.no_grad():
            entered = stream.teacher[rows].to(device)
            teacher = self.walk.teachers[stream.source].run(teacher_weights, entered)
        merged = self.walk.part.run(weights, stream.merged[rows].to(device))
        return divergence(merged, teacher, temperature=self.temperature).mean()
