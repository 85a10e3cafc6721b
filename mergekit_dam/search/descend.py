"""The descent of the end-to-end objective: steps of an optimiser on the unknowns.

1. The unknowns start at given coefficients.
2. A step takes the gradient on the next sequences of every model, and that of the penalties.
3. Every so often the merged model is judged on held-out data; the best look is the result.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorReport
from mergekit_dam.search.backprop import forward
from mergekit_dam.search.coordinates import coefficients_of, starting_unknowns
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


def judged_steps(steps: int) -> frozenset[int]:
    """The steps, counted from 1, after which a descent is judged: the last one is among them."""
    every = max(1, round(steps / LOOKS))
    return frozenset((*range(every, steps + 1, every), steps))


@dataclasses.dataclass(frozen=True)
class Descent:
    """Where a descent ended.

    Attributes:
        record: the best coefficients that were seen.
        verdict: of them.
        steps: after how many steps they were seen; 0 for the start.
        losses: of every step, on the data of the step, without penalties.
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
    steps: int,
    column_weights: Mapping[str, Tensor],
    seed: int,
) -> Descent:
    """Minimise the objective from a start.

    Args:
        verdict: of the start.
        steps: of the optimiser.
        column_weights: of the weighted overlap, by tensor; empty where that is off.
        seed: of the order of the sequences.
    """
    network = objective.network
    descender = Descender(objective, start, steps)
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
            if seen.mean < lowest.mean:
                best, lowest, best_step = now, seen, step
    return Descent(best, lowest, best_step, tuple(losses))


class Descender:
    """The unknowns of an objective, and the optimiser that moves them.

    Args:
        start: coefficients of every tensor to start from.
        steps: how many there will be, for the schedule of the learning rate.
    """

    def __init__(self, objective: Objective, start: MergeRecord, steps: int) -> None:
        self._objective, self._start = objective, start
        settings = objective.settings
        self._coordinates = list(objective.coordinates.values())
        self._unknowns = starting_unknowns(
            self._coordinates, start, settings.nonlinearity, objective.network.device
        )
        groups = [
            {
                "params": [self._unknowns[c.name]],
                "lr": settings.learning_rate or learning_rate(c.form),
            }
            for c in self._coordinates
        ]
        self._optimizer = make_optimizer(groups, settings)
        self._schedule = make_schedule(self._optimizer, settings, steps)

    def step(self, batches: Iterator[list[Batch]], column_weights: Mapping[str, Tensor]) -> float:
        """Take one step; returns the loss on its batches, without penalties."""
        objective, settings = self._objective, self._objective.settings
        coefficients = self._coefficients()
        point = at(self._start, coefficients, objective)
        loss = 0.0
        self._optimizer.zero_grad()
        for _ in range(settings.gradient_accumulation):
            part, gradients = objective(point, next(batches))
            loss += part / settings.gradient_accumulation
            torch.autograd.backward(
                [coefficients[name] for name in gradients],
                [
                    (gradient / settings.gradient_accumulation).to(coefficients[name])
                    for name, gradient in gradients.items()
                ],
                retain_graph=True,
            )
        penalties = penalty(merged_rows(coefficients, objective), settings, column_weights)
        if penalties.requires_grad:
            penalties.backward()  # type: ignore[no-untyped-call]
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._unknowns.values(), settings.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        return loss

    def point(self) -> MergeRecord:
        """Coefficients of every tensor, as they stand."""
        return at(self._start, self._coefficients(), self._objective)

    def _coefficients(self) -> dict[str, Tensor]:
        nonlinearity = self._objective.settings.nonlinearity
        return coefficients_of(self._coordinates, self._unknowns, nonlinearity)


def learning_rate(form: Parametrisation) -> float:
    """The learning rate for a form of the coefficients, where none is asked for.

    Coefficients that sum to one move the merged weight along the differences of the models; free
    ones scale all of it, and diverge at a tenth of that rate.
    """
    return 0.1 if form.sums_to_one else 0.01


def at(start: MergeRecord, coefficients: Mapping[str, Tensor], objective: Objective) -> MergeRecord:
    """The start with other coefficients for the fitted tensors, and for what is tied to them."""
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
            **{n: TensorReport(n, c.kind, "fitted end to end") for n, c in fitted.items()},
        },
    )


def merged_rows(coefficients: Mapping[str, Tensor], objective: Objective) -> dict[str, Tensor]:
    """Coefficients of the models alone: what the penalties are of."""
    return {
        name: rows[list(objective.coordinates[name].form.merged)]
        for name, rows in coefficients.items()
    }


def batches_of(
    data: Sequence[Stream], loss_weights: Sequence[float], size: int, seed: int
) -> Iterator[list[Batch]]:
    """Batches without end: the sequences of the fit in random order, again and again.

    The order is the same in all processes; each has the sequences of a batch that are its own.

    Args:
        loss_weights: weight of each source's data.
        size: sequences of every model in a batch, if it has so many.
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
    """Judge a merged model, running only what judges it."""
    split = judging_split(own.share for own in data)
    kept = [own.of(split) for own in data]
    hidden = forward(
        network, lambda _, opened: opened.merged_weights(point), [own.merged[:] for own in kept]
    )
    return judged_at_output(network, point, kept, hidden)


def judged_at_output(
    network: Network, point: MergeRecord, data: Sequence[Stream], hidden: Sequence[Sequences]
) -> Verdict:
    """Judge a merged model by what left its last block."""
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
