"""A plain descent of the end-to-end objective: all models in one graph, in fp64."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.batches import batches_of
from tests.kit.autograd import plain_loss
from tests.kit.networks import Made

SEED = 3


def steps_of(settings: RunParameters) -> int:
    assert settings.steps is not None
    return settings.steps


def rate_of(settings: RunParameters) -> float:
    assert settings.learning_rate is not None
    return settings.learning_rate


@dataclass
class Adam:
    """AdamW without decay, by the book; of the largest momenta alone where a fraction is given."""

    unknowns: dict[str, Tensor]
    fraction: float | None
    steps: int = 0

    def __post_init__(self) -> None:
        self.first = {n: torch.zeros_like(u) for n, u in self.unknowns.items()}
        self.second = {n: torch.zeros_like(u) for n, u in self.unknowns.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        self.steps += 1
        for name, unknown in self.unknowns.items():
            gradient = gradients[name]
            self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
            self.second[name] = 0.999 * self.second[name] + 0.001 * gradient.square()
            mean = self.first[name] / (1 - 0.9**self.steps)
            size = (self.second[name] / (1 - 0.999**self.steps)).sqrt()
            change = rate * mean / (size + 1e-8)
            if self.fraction is not None:
                count = max(1, int(self.fraction * unknown.shape[1]))
                chosen = torch.zeros_like(unknown, dtype=torch.bool)
                chosen.scatter_(1, self.first[name].abs().topk(count, dim=1).indices, True)
                change = torch.where(chosen, change, 0.0)
            unknown -= change


def plain_rate(settings: RunParameters, step: int) -> float:
    """Learning rate of a step, counted from 0."""
    rate, steps = rate_of(settings), steps_of(settings)
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return rate * step / warm
    if settings.lr_schedule == "constant":
        return rate
    done = (step - warm) / (steps - warm)
    falling = 1 - done if settings.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return rate * falling


def plain_penalty(
    rows: Mapping[str, Tensor], settings: RunParameters, weights: Mapping[str, Tensor]
) -> Tensor:
    """Of coefficients `[models, n]` by tensor."""
    total = torch.zeros((), dtype=torch.float64)
    for name, values in rows.items():
        pairs = list(itertools.combinations(values, 2))
        total = total + settings.l1 * values.abs().sum()
        total = total + settings.l2 * values.square().sum(1).sqrt().sum()
        for index, (a, b) in enumerate(pairs):
            cosine = torch.cosine_similarity(a, b, dim=0)
            smaller = torch.minimum(a.abs(), b.abs())
            total = total + settings.similarity * cosine / len(pairs)
            total = total + settings.overlap * smaller.sum() / len(pairs)
            if name in weights:
                own = (smaller * weights[name][index]).sum()
                total = total + settings.weighted_overlap * own / len(pairs)
    return total


APPLY = {"none": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}


INVERT = {"none": lambda x: x, "tanh": torch.atanh, "sigmoid": torch.logit, "relu": lambda x: x}


def plain_descent(
    made: Made, settings: RunParameters, weights: Mapping[str, Tensor], start: MergeRecord
) -> tuple[dict[str, Tensor], list[float]]:
    """Coefficients after all steps, and the loss of every step; fp64, one graph."""
    form = made.settings.parametrisation
    unknowns = {
        name: INVERT[settings.nonlinearity](form.unknowns(start.coefficients[name])).repeat(
            1, own.columns if start.coefficients[name].shape[1] == 1 else 1
        )
        for name, own in made.coordinates.items()
    }
    axes = {name: own.axis for name, own in made.coordinates.items()}
    optimizer = Adam(unknowns, settings.mofo_fraction if settings.optimizer == "mofo" else None)
    batches = batches_of(made.data(), made.settings.loss_weights, settings.batch_size, SEED)

    def coefficients() -> dict[str, Tensor]:
        return {
            n: form.offset[:, None] + form.expand @ APPLY[settings.nonlinearity](u)
            for n, u in unknowns.items()
        }

    losses = []
    for step in range(steps_of(settings)):
        for unknown in unknowns.values():
            unknown.requires_grad_()
        rows = coefficients()
        # The streamed one keeps its coefficients in fp32.
        rows = {n: c + (c.float().double() - c).detach() for n, c in rows.items()}
        merged = made.differentiable(rows, axes)
        loss = torch.zeros((), dtype=torch.float64)
        for batch in itertools.chain(
            *itertools.islice(batches, settings.gradient_accumulation),
        ):
            teacher = made.logits(made.weights[batch.source], batch.tokens)
            own = plain_loss(made.logits(merged, batch.tokens), teacher, settings)
            loss = loss + batch.weight * own / settings.gradient_accumulation
        losses.append(float(loss.detach()))
        models = {n: c[list(form.merged)] for n, c in rows.items()}
        total = loss + plain_penalty(models, settings, weights)
        found = torch.autograd.grad(total, list(unknowns.values()))
        size = torch.cat([g.flatten() for g in found]).norm()
        factor = min(1.0, settings.max_grad_norm / float(size)) if settings.max_grad_norm else 1.0
        for unknown in unknowns.values():
            unknown.requires_grad_(False)
        gradients = {n: factor * g for n, g in zip(unknowns, found, strict=True)}
        optimizer.step(gradients, plain_rate(settings, step))
    return coefficients(), losses
