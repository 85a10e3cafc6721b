"""The descent of the end-to-end objective: steps of an optimiser on the unknowns.

1. The unknowns are coefficients and the factors of corrections. They start at a given point.
2. Each step uses the gradient on the next sequences of every model, plus that of the penalties.
3. At regular intervals the merged model is judged on held-out data. The result is the best point
   that was judged.
4. An interrupt, or the end of the time that the merge may take, ends a descent early: the point
   that it has come to is judged, and the result is the best one so far. So does a descent that
   nobody asked for, where it has no prospect (`_Course.without_prospect`).
5. From time to time, the state of all this is kept in the journal, for a next run.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.journal import Journal
from mergekit_dam.layers.sweep import CORRECTIONS
from mergekit_dam.search.batches import batches_of
from mergekit_dam.search.best import record_of
from mergekit_dam.search.descender import Descender
from mergekit_dam.search.factors import Factors
from mergekit_dam.search.gradient import Batch, Objective
from mergekit_dam.search.judge import Verdict, verdict_of
from mergekit_dam.search.pace import SETTLED, Pace, judged_steps
from mergekit_dam.streams import progress
from mergekit_dam.streams.stream import Stream

INTERRUPTED = "an interrupt"
"""Why a descent ended early: ctrl-C, or SIGTERM."""

Kind = Literal["asked for", "trial", "further"]
"""What a descent is: one that the configuration asks for, or the first or a later one of those that
are run as long as they pay."""

ONLY_LOST = "a first half that only lost"
"""Why a descent that is a trial ended early."""

NEAR = 0.01
"""Fraction of the start's KL by which every point of a trial's first half is worse where it ends.
Rates are highest in that half: points about as good as the start come before better ones."""

NO_GAIN = "three judgements in a row that found no better point"
"""Why a descent that followed a trial ended early."""

PATIENCE = 3
"""Judgements without a better point after which a descent that followed a trial ends. In those that
gained to their end, at most one in a row found none."""

OUT_OF_TIME = "`max_minutes`"
"""Why a descent ended early: the merge would have taken longer than it may."""


@dataclasses.dataclass(frozen=True)
class Descent:
    """The result of a descent.

    Attributes:
        record: the best coefficients that were judged.
        verdict: the verdict on them.
        steps: number of steps after which they were judged; 0 for the start.
        losses: loss of every step, on the data of the step, without penalties.
        ended: why it ended before all steps were taken; empty if they were.
    """

    record: MergeRecord
    verdict: Verdict
    steps: int
    losses: tuple[float, ...]
    ended: str = ""


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
    journal: Journal,
    name: str,
    left: float = 1.0,
    kind: Kind = "asked for",
    pace: Pace | None = None,
    interrupted: Callable[[], bool] = lambda: False,
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
        journal: keeps how far the descent is, and has room for the corrections of its best point.
        name: name of the descent in the journal.
        left: fraction of the held-out KL at the start of the search that is left.
        kind: what it is; one that nobody asked for ends where it has no prospect.
        pace: how many steps there is time for; all of them by default.
        interrupted: whether the descent is asked to end after the step that it takes.
    """
    pace, network = pace or Pace(), objective.network
    factors = Factors(objective.coordinates.values(), start.corrections, folder=moving, seed=seed)
    descender = Descender(objective, start, steps, factors, left)
    course = _Course(descender, _Best(start, verdict), steps, [])
    course.go_on(journal, name)
    best, losses, ended, shown = course.best, course.losses, "", phase_name(steps)
    progress.begin(shown, done=len(losses), steps=course.planned)
    batches = batches_of(
        data,
        network.loss_weights,
        objective.settings.batch_size,
        seed,
        taken=len(losses) * objective.settings.gradient_accumulation,
    )
    while len(losses) < course.planned and not ended:
        with pace.measured(pace.step):
            step = course.step(batches, column_weights)
        if step == SETTLED:
            course.planned = step + pace.steps(steps - step)
            descender.plan(course.planned)
            progress.begin(shown, steps=course.planned)
        ended = _early_end(step, course.planned, steps, pace, interrupted)
        if ended or step in judged_steps(course.planned):
            with pace.measured(pace.look):
                now = descender.point()
                seen = verdict_of(network, now, data)
            course.look(seen)
            if seen.mean < best.verdict.mean and seen.better_than(verdict, allowance):
                folder = journal.path(f"{CORRECTIONS}-{name}-{step}")
                own = factors.kept(now.coefficients, folder, journal)
                best.take(dataclasses.replace(now, corrections=own), seen, step)
            if not ended and step < course.planned:
                ended = course.without_prospect(kind, steps, verdict)
                ended = ended or (INTERRUPTED if interrupted() else "")
        if journal.due() and not ended:  # or it would go on, if it is continued from there
            course.keep(journal, name)
    return Descent(best.record, best.verdict, best.step, tuple(losses), ended)


def phase_name(steps: int) -> str:
    """Name of a descent among the phases of a merge."""
    return f"descent of {steps} steps"


def _early_end(
    step: int, planned: int, steps: int, pace: Pace, interrupted: Callable[[], bool]
) -> str:
    """Why a descent ends after a step before all were taken; empty if it does not."""
    if step < planned and interrupted():
        return INTERRUPTED
    out_of_time = planned < steps if step == planned else not pace.steps(1)
    return OUT_OF_TIME if out_of_time else ""


@dataclasses.dataclass
class _Course:
    """How far a descent is.

    Attributes:
        descender: what moves.
        best: the best point so far.
        planned: number of steps that there is time for.
        losses: loss of every step so far.
        lowest: lowest mean KL of all looks so far.
    """

    descender: Descender
    best: "_Best"
    planned: int
    losses: list[float]
    lowest: float = math.inf

    def step(self, batches: Iterator[list[Batch]], column_weights: Mapping[str, Tensor]) -> int:
        """Take a step, and tell how it went; returns the number of steps so far."""
        rates = self.descender.rates
        loss = self.descender.step(batches, column_weights)
        self.losses.append(loss)
        step, lowest = len(self.losses), self.best.verdict.mean
        progress.track({"loss": loss, **rates}, step=step)
        said = f"step {step}/{self.planned} loss {loss:.4g} held-out KL {lowest:.4g}"
        progress.show(said, step=step)
        return step

    def look(self, seen: Verdict) -> None:
        """Take note of how good the model is after this step."""
        progress.track(seen.numbers, step=len(self.losses))
        self.lowest = min(self.lowest, seen.mean)

    def without_prospect(self, kind: Kind, steps: int, start: Verdict) -> str:
        """Why a descent that nobody asked for should end; empty if it should not.

        A trial ends halfway if all looks so far are worse than the start, by more than a little;
        one that follows, if the last looks have brought nothing, unless time has made it shorter.
        """
        step = len(self.losses)
        if kind == "trial" and 2 * step >= steps and self.lowest > (1 + NEAR) * start.mean:
            return ONLY_LOST
        if kind == "further" and self.planned == steps:
            idle = sum(self.best.step < look <= step for look in judged_steps(steps))
            return NO_GAIN if idle >= PATIENCE else ""
        return ""

    def keep(self, journal: Journal, name: str) -> None:
        """Keep it for a next run."""
        best = self.best
        found = {"step": best.step, "verdict": dataclasses.asdict(best.verdict)}
        if best.step:
            found["record"] = best.record.state
        own = {
            "planned": self.planned,
            "losses": self.losses,
            "lowest": self.lowest,
            "descender": self.descender.state,
        }
        said = f"{len(self.losses)} of {self.planned} steps of a descent were taken"
        journal.put(name, {**own, "best": found}, said=said)

    def go_on(self, journal: Journal, name: str) -> None:
        """Go on from where an earlier run has kept it, if there was one."""
        state = journal.get(name)
        if state is None:
            return
        self.planned, best = state["planned"], state["best"]
        self.losses.extend(state["losses"])
        self.lowest = state["lowest"]
        self.descender.restore(state["descender"], self.planned)
        if best["step"]:
            record = record_of(best["record"], journal)
            self.best.take(record, Verdict.of_state(best["verdict"]), best["step"])


@dataclasses.dataclass
class _Best:
    """The best point of a descent so far, and the number of steps that led to it."""

    record: MergeRecord
    verdict: Verdict
    step: int = 0

    def take(self, record: MergeRecord, verdict: Verdict, step: int) -> None:
        """Take a better one; corrections of the start belong to the search."""
        if self.step and self.record.corrections is not None:
            self.record.corrections.discard()
        self.record, self.verdict, self.step = record, verdict, step
