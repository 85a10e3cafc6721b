"""The descent of the end-to-end objective: steps of an optimiser on the unknowns.

1. The unknowns are coefficients and the factors of corrections. They start at a given point.
2. Each step uses the gradient on the next sequences of every model, plus that of the penalties.
3. At regular intervals the merged model is judged on held-out data. The result is the best point
   that was judged.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorReport
from mergekit_dam.search.backprop import forward
from mergekit_dam.search.coordinates import Coordinate, coefficients_of, starting_unknowns
from mergekit_dam.search.factors import Factors
from mergekit_dam.search.gradient import Batch, Objective
from mergekit_dam.search.judge import Verdict, judge
from mergekit_dam.search.optimizers import make_optimizer, make_schedule
from mergekit_dam.search.regularisers import penalty
from mergekit_dam.sources.network import Network
from mergekit_dam.streams import progress
from mergekit_dam.streams.share import judging_split
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream

LOOKS = 8
"""How often a descent is judged on held-out data, about."""

FACTOR_RATE = 1e-3
"""Default learning rate of the factors of corrections, far from the teachers."""

FULL_RATE_FROM = 0.4
"""Fraction of the start's KL from which rates are full where factors move; they fall with it."""


def judged_steps(steps: int) -> frozenset[int]:
    """The steps, counted from 1, after which a descent is judged: the last one is among them."""
    every = max(1, round(steps / LOOKS))
    return frozenset((*range(every, steps + 1, every), steps))


@dataclasses.dataclass(frozen=True)
class Descent:
    """The result of a descent.

    Attributes:
        record: the best coefficients that were judged.
        verdict: the verdict on them.
        steps: number of steps after which they were judged; 0 for the start.
        losses: loss of every step, on the data of the step, without penalties.
    """

    record: MergeRecord
    verdict: Verdict
    steps: int
    losses: tuple[float, ...]


@torch.enable_grad()
def descend(
    objective: Objective,
    data: Sequence[Stream],
    start: MergeRecord,
    verdict: Verdict,
    *,
    allowance: float,
    steps: int,
    column_weights: Mapping[str, Tensor],
    seed: int,
    moving: Path,
    kept: Path,
    left: float = 1.0,
) -> Descent:
    """Minimise the objective from a start.

    Args:
        objective: the objective.
        data: calibration tokens, and the hidden states that leave the teachers' last blocks.
        start: coefficients of every tensor to start from.
        verdict: verdict on the start.
        allowance: rise of one model's divergence over the start's that a point may cost.
        steps: number of steps of the optimiser.
        column_weights: weights of the weighted overlap, by tensor; empty where that is off.
        seed: seed of the order of the sequences, and of random factors.
        moving: folder for the factors of corrections while they move.
        kept: folder for a folder with the corrections of the best point.
        left: fraction of the held-out KL at the start of the search that is left.
    """
    network = objective.network
    coordinates = objective.coordinates.values()
    factors = Factors(coordinates, start.corrections, folder=moving, seed=seed)
    descender = Descender(objective, start, steps, factors, left)
    batches = batches_of(data, network.loss_weights, objective.settings.batch_size, seed)
    best, lowest, best_step = start, verdict, 0
    losses = []
    judged = judged_steps(steps)
    for step in range(1, steps + 1):
        loss = descender.step(batches, column_weights)
        losses.append(loss)
        progress.show(f"step {step}/{steps} loss {loss:.4g} held-out KL {lowest.mean:.4g}")
        if step in judged:
            with torch.no_grad():
                now = descender.point()
            seen = verdict_of(network, now, data)
            if seen.mean < lowest.mean and seen.better_than(verdict, allowance):
                if best is not start and best.corrections is not None:
                    best.corrections.discard()
                own = factors.kept(now.coefficients, kept / f"{moving.name}-{step}")
                best = dataclasses.replace(now, corrections=own)
                lowest, best_step = seen, step
    return Descent(best, lowest, best_step, tuple(losses))


class Descender:
    """The unknowns of an objective, and the optimiser that moves them.

    Args:
        objective: the objective.
        start: coefficients of every tensor to start from.
        steps: total number of steps, for the learning rate's schedule.
        factors: the corrections, of which factors move.
        left: as for `descend`; it scales default rates where factors move.
    """

    def __init__(
        self,
        objective: Objective,
        start: MergeRecord,
        steps: int,
        factors: Factors,
        left: float,
    ) -> None:
        self._objective, self._start, self._factors = objective, start, factors
        settings = objective.settings
        asked, scale = settings.learning_rate, min(1.0, left / FULL_RATE_FROM)
        self._coordinates = list(objective.coordinates.values())
        self._unknowns = starting_unknowns(
            self._coordinates, start, settings.nonlinearity, objective.network.device
        )
        groups = [
            {
                "params": [self._unknowns[c.name]],
                "lr": asked or learning_rate(c.form, scale if factors.move else None),
            }
            for c in self._coordinates
        ]
        self.optimizers = [make_optimizer(groups, settings)]
        if factors.move:
            self.optimizers.append(factors.optimizer(asked / 50 if asked else FACTOR_RATE * scale))
        self._schedules = [make_schedule(own, settings, steps) for own in self.optimizers]

    def step(self, batches: Iterator[list[Batch]], column_weights: Mapping[str, Tensor]) -> float:
        """Take one step; returns the loss on its batches, without penalties."""
        objective, settings = self._objective, self._objective.settings
        coefficients = self._coefficients()
        point = at(self._start, coefficients, objective, self._factors)
        loss = 0.0
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=optimizer is self.optimizers[0])
        for _ in range(settings.gradient_accumulation):
            part, gradients = objective(point, next(batches), self._factors)
            loss += part / settings.gradient_accumulation
            torch.autograd.backward(
                [coefficients[name] for name in gradients],
                [
                    (gradient / settings.gradient_accumulation).to(coefficients[name])
                    for name, gradient in gradients.items()
                ],
                retain_graph=True,  # the coefficients' graph serves all batches and penalties
            )
        penalties = penalty(merged_rows(coefficients, objective), settings, column_weights)
        if penalties.requires_grad:
            penalties.backward()  # type: ignore[no-untyped-call]
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._unknowns.values(), settings.max_grad_norm)
        self._factors.add_up()
        for optimizer, schedule in zip(self.optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        return loss

    def point(self) -> MergeRecord:
        """The current coefficients of every tensor."""
        return at(self._start, self._coefficients(), self._objective, self._factors)

    def _coefficients(self) -> dict[str, Tensor]:
        nonlinearity = self._objective.settings.nonlinearity
        return coefficients_of(self._coordinates, self._unknowns, nonlinearity)


def learning_rate(form: Parametrisation, scale: float | None) -> float:
    """The default learning rate for a form of the coefficients.

    Coefficients that sum to one move the merged weight along the differences of the models. Free
    coefficients scale the whole weight, and diverge at a tenth of that rate.

    Args:
        scale: Where factors move, the factor of all rates: near to the teachers, large steps do
            harm. Beside factors, coefficients have less to do, and half their rate.
    """
    rate = 0.1 if form.sums_to_one else 0.01
    return rate if scale is None else rate / 2 * scale


def at(
    start: MergeRecord,
    coefficients: Mapping[str, Tensor],
    objective: Objective,
    factors: Factors,
) -> MergeRecord:
    """The start with other coefficients for fitted tensors and those tied to them, and factors."""
    found = {name: rows.detach().cpu() for name, rows in coefficients.items()}
    for name, other in objective.network.tied.items():
        if other in found:
            found[name] = found[other]
    fitted = objective.coordinates
    return dataclasses.replace(
        start,
        coefficients={**start.coefficients, **found},
        axes={**start.axes, **{n: c.axis for n, c in fitted.items() if c.axis != -1}},
        reports={
            **start.reports,
            **{n: _report(c, start.reports.get(n)) for n, c in fitted.items()},
        },
        corrections=factors,
    )


def _report(coordinate: Coordinate, start: TensorReport | None) -> TensorReport:
    """The report of a tensor that was fitted end to end; what is said of a correction stays."""
    correction = dict(start.correction) if start is not None else {}
    if coordinate.rank:
        correction["descended_rank"] = coordinate.rank
    return TensorReport(
        coordinate.name, coordinate.kind, "fitted end to end", correction=correction
    )


def merged_rows(coefficients: Mapping[str, Tensor], objective: Objective) -> dict[str, Tensor]:
    """Coefficients of the merged models alone, to which the penalties apply."""
    return {
        name: rows[list(objective.coordinates[name].form.merged)]
        for name, rows in coefficients.items()
    }


def batches_of(
    data: Sequence[Stream], loss_weights: Sequence[float], size: int, seed: int
) -> Iterator[list[Batch]]:
    """Batches without end: the sequences of the fit in random order, again and again.

    The order is the same in all processes; each process gets its own sequences of a batch.

    Args:
        data: calibration tokens, and the hidden states that leave the teachers' last blocks.
        loss_weights: weight of each source's data.
        size: sequences per model in a batch; fewer if the model has fewer.
        seed: seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    fit = [own.of("fit") for own in data]
    queues: list[list[int]] = [[] for _ in fit]
    while True:
        batch = []
        for own, queue in zip(fit, queues, strict=True):
            count = own.share.count("fit")
            wanted = min(size, count)
            if len(queue) < wanted:
                queue.extend(torch.randperm(count, generator=generator).tolist())
            chosen = [queue.pop(0) for _ in range(wanted)]
            rows = [row for number in chosen if (row := own.share.row_of(number)) is not None]
            at_hand = torch.tensor(rows, dtype=torch.int64)
            weight, tokens = loss_weights[own.source], own.merged[at_hand]
            batch.append(Batch(own.source, weight, tokens, own.teacher[at_hand], wanted))
        yield batch


def verdict_of(network: Network, point: MergeRecord, data: Sequence[Stream]) -> Verdict:
    """Judge a merged model; runs only the sequences that judge it."""
    split = judging_split(own.share for own in data)
    kept = [own.of(split) for own in data]
    hidden = forward(
        network, lambda _, opened: opened.merged_weights(point), [own.merged[:] for own in kept]
    )
    return judged_at_output(network, point, kept, hidden)


def judged_at_output(
    network: Network, point: MergeRecord, data: Sequence[Stream], hidden: Sequence[Sequences]
) -> Verdict:
    """Judge a merged model from the hidden states that left its last block."""
    opened = network.output()
    weights = opened.merged_weights(point)

    def teacher(source: int) -> Callable[[Tensor], Tensor]:
        own = opened.teacher_weights(source)
        return lambda x: opened.teacher_part(source).run(own, x)

    return judge(
        [dataclasses.replace(own, merged=x) for own, x in zip(data, hidden, strict=True)],
        lambda x: opened.part.run(weights, x),
        {own.source: teacher(own.source) for own in data},
        [network.loss_weights[own.source] for own in data],
        network.device,
    )
