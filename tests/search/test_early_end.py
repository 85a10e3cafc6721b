"""Descents that end early, and what a search leaves out when its time is short."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.journal import Journal
from mergekit_dam.search import descend as descend_module
from mergekit_dam.search.descend import (
    INTERRUPTED,
    NO_GAIN,
    ONLY_LOST,
    OUT_OF_TIME,
    Descent,
    Kind,
    descend,
)
from mergekit_dam.search.descender import Descender
from mergekit_dam.search.gradient import Objective
from mergekit_dam.search.judge import Verdict
from mergekit_dam.search.pace import SETTLED, Pace, judged_steps
from mergekit_dam.search.search import Swept
from mergekit_dam.streams.boundaries import BoundaryStates
from tests.kit.descents import plain_rate
from tests.kit.networks import Made, make
from tests.kit.searches import searched
from tests.kit.settings import logits_settings

STEP, LOOK, WRITING = 1.0, 2.0, 50.0
"""Seconds by the clock of these tests."""


class Clock:
    """A clock that steps and judgements move on, and nothing else; with every step's rate."""

    now = 1000.0
    rates: tuple[float, ...] = ()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock, and a judge that likes every look better than the one before."""
    clock, stock, looks = Clock(), Descender.step, itertools.count()

    def step(descender: Descender, *arguments: Any) -> float:
        clock.now += STEP
        clock.rates += (descender.optimizers[0].param_groups[0]["lr"],)
        return stock(descender, *arguments)

    def verdict_of(*_: Any) -> Verdict:
        clock.now += LOOK
        return Verdict((1 / (2 + next(looks)),) * 2, (1.0, 1.0))

    monkeypatch.setattr(Descender, "step", step)
    monkeypatch.setattr(descend_module, "verdict_of", verdict_of)
    return clock


def descended(
    made: Made,
    folder: Path,
    steps: int,
    *,
    kind: Kind = "asked for",
    pace: Pace | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Descent:
    boundaries = BoundaryStates(folder)
    objective = Objective(
        made.network(), made.coordinates, logits_settings(**settings, steps=steps), boundaries
    )
    return descend(
        objective,
        made.data(),
        made.average(),
        Verdict((1.0, 1.0), (1.0, 1.0)),
        allowance=1.0,
        steps=steps,
        column_weights={},
        seed=0,
        moving=folder / "moving",
        journal=Journal(folder, keeps=False),
        name="descent",
        kind=kind,
        pace=pace,
        interrupted=interrupted,
    )


def same(found: Descent, expected: Descent) -> bool:
    ours, theirs = found.record.coefficients, expected.record.coefficients
    assert ours.keys() == theirs.keys()
    return found.losses == expected.losses and all(ours[n].equal(theirs[n]) for n in theirs)


def until(clock: Clock, seconds: float) -> Pace:
    pace = Pace(ends=clock.now + seconds + WRITING, clock=clock)
    pace.surveyed(WRITING / 2)
    pace.look.guess = LOOK
    return pace


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("after", [1, 3, 8])
def test_an_interrupt_ends_a_descent_with_the_point_it_has_come_to(
    after: int, tmp_path: Path
) -> None:
    made, calls = make(), itertools.count(1)
    found = descended(
        made,
        tmp_path,
        32,  # judged after 4, 8, ...
        interrupted=lambda: next(calls) >= after,
        lr_schedule="constant",
    )
    assert found.ended == INTERRUPTED
    assert len(found.losses) == found.steps >= 1
    assert same(found, descended(made, tmp_path, found.steps, lr_schedule="constant"))


@pytest.mark.usefixtures("clock")
def test_an_interrupt_in_the_last_step_is_too_late(tmp_path: Path) -> None:
    last = descended(make(), tmp_path, 1, interrupted=lambda: True)
    assert (last.ended, last.steps) == ("", 1)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("kind", "gaining", "steps"),
    [
        ("trial", None, 10),
        ("trial", 10, 20),
        ("trial", 4, 20),
        ("trial", 12, 10),
        ("asked for", None, 20),
    ],
)
@pytest.mark.parametrize("near", [0.9, 1.005], ids=["better", "about as good"])
def test_a_trial_whose_first_half_only_loses_ends(
    kind: Kind,
    gaining: int | None,
    steps: int,
    near: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A descent that somebody asked for takes all of its steps."""
    looks = itertools.count(2, 2)  # of 20 steps, every second one is judged

    def verdict_of(*_: Any) -> Verdict:
        return Verdict((near if next(looks) == gaining else 2.0,) * 2, (1.0, 1.0))

    monkeypatch.setattr(descend_module, "verdict_of", verdict_of)
    found = descended(make(), tmp_path, 20, kind=kind)
    assert len(found.losses) == steps
    assert found.ended == (ONLY_LOST if steps == 10 else "")
    assert found.steps == (gaining if steps == 20 and gaining and near < 1 else 0)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("kind", "gaining", "steps"),
    [
        ("further", {8, 24}, 48),  # of 64 steps, every eighth is judged
        ("further", {8, 32, 56}, 64),
        ("further", {8, 64}, 32),
        ("further", set(), 24),
        ("trial", {8, 24}, 64),
        ("asked for", {8}, 64),
    ],
)
def test_a_descent_after_a_trial_ends_where_three_judgements_find_nothing_better(
    kind: Kind, gaining: set[int], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count(8, 8)

    def verdict_of(*_: Any) -> Verdict:
        step = next(looks)
        return Verdict((0.9 - step / 1000 if step in gaining else 1.0,) * 2, (1.0, 1.0))

    monkeypatch.setattr(descend_module, "verdict_of", verdict_of)
    found = descended(make(), tmp_path, 64, kind=kind)
    assert len(found.losses) == steps
    assert found.ended == ("" if steps == 64 else NO_GAIN)
    assert found.steps == max((step for step in gaining if step <= steps), default=0)


def test_a_descent_that_time_has_made_shorter_takes_all_of_its_steps(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descend_module, "verdict_of", lambda *_: Verdict((2.0,) * 2, (1.0, 1.0)))
    found = descended(make(), tmp_path, 400, kind="further", pace=until(clock, 45))
    assert found.ended == OUT_OF_TIME
    assert len(found.losses) > 20


@pytest.mark.usefixtures("clock")
def test_a_trial_that_ended_halfway_is_not_continued_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    monkeypatch.setattr(descend_module, "verdict_of", lambda *_: Verdict((2.0,) * 2, (1.0, 1.0)))
    monkeypatch.setattr(Journal, "due", lambda _: True)
    monkeypatch.setattr(
        Journal, "put", lambda _, name, state, **more: kept.append(len(state["losses"]))
    )
    assert descended(make(), tmp_path, 20, kind="trial").ended == ONLY_LOST
    assert kept == list(range(1, 10))


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0.0), ("linear", 0.3)])
def test_a_descent_that_is_cut_short_goes_on_as_one_of_fewer_steps(
    clock: Clock, tmp_path: Path, schedule: Any, warmup: float
) -> None:
    pace = until(clock, 40.0)
    found = descended(make(), tmp_path, 1000, pace=pace, lr_schedule=schedule, warmup=warmup)
    assert clock.now <= pace.ends - WRITING
    assert found.ended == OUT_OF_TIME
    taken = len(found.losses)
    # One step more, with its judgements, would not fit.
    assert (taken + 1) * STEP + len(judged_steps(taken + 1)) * LOOK > 40.0
    assert found.steps == taken
    planned = [1000] * SETTLED + [taken] * (taken - SETTLED)
    assert clock.rates == pytest.approx(
        [
            plain_rate(logits_settings(steps=steps, lr_schedule=schedule, warmup=warmup), step)
            for step, steps in enumerate(planned)
        ]
    )


def test_a_descent_that_gets_slower_ends_in_time(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, taken = Descender.step, itertools.count(1)

    def slow(*arguments: Any) -> float:
        clock.now += 5 * STEP if next(taken) > 2 * SETTLED else 0
        return quick(*arguments)

    monkeypatch.setattr(Descender, "step", slow)
    pace = until(clock, 60.0)
    found = descended(make(), tmp_path, 100, pace=pace)
    assert found.ended == OUT_OF_TIME
    assert clock.now <= pace.ends - WRITING
    assert found.steps == len(found.losses) > 2 * SETTLED


def test_a_descent_with_enough_time_is_the_same(clock: Clock, tmp_path: Path) -> None:
    made = make()
    found = descended(made, tmp_path, 9, pace=until(clock, 1e6))
    assert found.ended == ""
    assert same(found, descended(made, tmp_path, 9))


def test_what_has_no_time_is_left_out_and_recorded(clock: Clock) -> None:
    pace = until(clock, 100.0)
    assert pace.allows("a walk", 99.0)
    assert not pace.left_out
    assert not pace.allows("a hike", 150.0)
    assert pace.left_out == [
        "no time for a hike: it needs 2.5 min, and `max_minutes` leaves 1.7 min before the merge "
        "is written"
    ]
    assert Pace().allows("everything", 1e9)
    assert Pace().steps(10**6) == 10**6


@pytest.mark.parametrize("objective", ["layer+logits", "logits"])
def test_without_time_there_is_no_descent(objective: str, tmp_path: Path) -> None:
    made = make()
    short = searched(made, tmp_path, objective=objective, max_minutes=1e-6)
    long = searched(made, tmp_path, objective=objective, max_minutes=1e6)
    free = searched(made, tmp_path, objective=objective)
    (said,) = short.left_out
    assert said.startswith("no time for a descent of 2 steps")
    assert [trial.name for trial in short.trials] == [trial.name for trial in free.trials[:-1]]
    assert not long.left_out
    for name, rows in free.coefficients.items():
        assert long.coefficients[name].equal(rows)


def test_a_second_layer_sweep_needs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_good(own: Swept, network: Any, best: Any, data: Any) -> None:
        verdict = Verdict((9.0, 9.0), (1.0, 1.0))
        best.consider(own.name, own.record, verdict, own.started)

    monkeypatch.setattr(Swept, "consider", no_good)

    def names(record: MergeRecord) -> list[str]:
        return [trial.name for trial in record.trials]

    settings = {"objective": "layer", "metric": "sensitivity", "steps": None}
    free = searched(make(), tmp_path, **settings)
    short = searched(make(), tmp_path, **settings, max_minutes=1e-6)
    assert names(free) == ["start", "layer, sensitivity", "layer, identity"]
    assert names(short) == ["start", "layer, sensitivity"]
    assert short.left_out[0].startswith("no time for a sweep of layer fits in the plain metric")
