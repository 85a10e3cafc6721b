"""The unknowns of a descent, and the steps that move them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorReport
from mergekit_dam.search.coordinates import Coordinate, coefficients_of, starting_unknowns
from mergekit_dam.search.factors import Factors
from mergekit_dam.search.gradient import Batch, Objective
from mergekit_dam.search.optimizers import make_optimizer, make_schedule
from mergekit_dam.search.regularisers import penalty

FACTOR_RATE = 1e-3
"""Default learning rate of the factors of corrections, far from the teachers."""

FULL_RATE_FROM = 0.4
"""Fraction of the start's KL from which rates are full where factors move; they fall with it."""

SHORT = 50
"""Steps up to which a descent has no time to make good what a large step harms: where factors move,
its rates begin at half of the full ones, at the whole of the start's KL, and fall with it."""


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
        asked = settings.learning_rate
        scale = left / 2 if steps <= SHORT else min(1.0, left / FULL_RATE_FROM)
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

    @property
    def rates(self) -> dict[str, float]:
        """Largest learning rate of the next step, of coefficients and of factors if they move."""
        names = ("learning rate", "learning rate of factors")[: len(self.optimizers)]
        return {
            name: max(group["lr"] for group in optimizer.param_groups)
            for name, optimizer in zip(names, self.optimizers, strict=True)
        }

    def plan(self, steps: int) -> None:
        """Let the learning rates fall as they do in so many steps, of which some are taken."""
        taken = self._schedules[0].last_epoch
        self._schedules = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"]
            schedule = make_schedule(optimizer, self._objective.settings, steps)
            for _ in range(taken):
                schedule.step()
            self._schedules.append(schedule)

    @property
    def _moved(self) -> list[list[Tensor]]:
        """What every optimiser moves: unknowns, and factors if there are any."""
        unknowns = [self._unknowns[coordinate.name] for coordinate in self._coordinates]
        return [unknowns, self._factors.all][: len(self.optimizers)]

    @property
    def state(self) -> dict[str, Any]:
        """Values and moments of all that moves, and the learning rates, for the journal."""
        moved = [
            [{"value": own, "moments": dict(optimizer.state.get(own, {}))} for own in every]
            for optimizer, every in zip(self.optimizers, self._moved, strict=True)
        ]
        return {"moved": moved, "schedules": [own.state_dict() for own in self._schedules]}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any], steps: int) -> None:
        """Go on from where an earlier run was.

        Args:
            state: what `state` was then.
            steps: number of all steps.
        """
        for optimizer, moved, kept in zip(
            self.optimizers, self._moved, state["moved"], strict=True
        ):
            for own, known in zip(moved, kept, strict=True):
                own.copy_(known["value"])
                for name, moment in known["moments"].items():
                    if name in optimizer.state[own]:  # factors have theirs in files
                        optimizer.state[own][name].copy_(moment)
                    else:  # the count of steps stays on the host
                        place = own.device if moment.dim() else moment.device
                        optimizer.state[own][name] = moment.clone().to(place)
        self.plan(steps)
        for schedule, known in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(known)
            rates = schedule.get_last_lr()
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

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
    """The report of a tensor that was fitted end to end; what a layer fit said of it stays."""
    start = start or TensorReport(coordinate.name, coordinate.kind, "")
    correction = dict(start.correction)
    if coordinate.rank:
        correction["descended_rank"] = coordinate.rank
    return dataclasses.replace(
        start,
        kind=coordinate.kind,
        outcome="fitted end to end",
        solver={},
        experts={},
        correction=correction,
    )


def merged_rows(coefficients: Mapping[str, Tensor], objective: Objective) -> dict[str, Tensor]:
    """Coefficients of the merged models alone, to which the penalties apply."""
    return {
        name: rows[list(objective.coordinates[name].form.merged)]
        for name, rows in coefficients.items()
    }
