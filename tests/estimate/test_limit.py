"""What fits into `max_minutes`."""

from typing import Any

import pytest

from mergekit_dam.estimate.limit import Fitting, within
from mergekit_dam.estimate.report import table, to_json
from mergekit_dam.estimate.sweeps import Sweep
from mergekit_dam.fitting.costs import Work
from tests.kit.estimates import planned_estimate


def sweep(name: str, condition: str = "", steps: int = 0) -> Sweep:
    return Sweep(name, 0, Work(), condition=condition, steps=steps)


SWEEPS = (
    sweep("survey"),
    sweep("layer fits"),
    sweep("again", "if those are no good"),
    sweep("short", "if much is left", 20),
    sweep("long", "if that pays", 400),
    sweep("merge and write"),
)
SECONDS = (5.0, 50.0, 40.0, 20.0, 400.0, 10.0)
STARTUP = 5.0


@pytest.mark.parametrize(
    ("limit", "again", "short", "long"),
    [
        (1.0, False, 0, 0),
        (80.0, False, 10, 0),
        (90.0, False, 20, 0),
        (110.0, True, 20, 0),  # no more than the short one took
        (111.0, True, 20, 21),
        (190.0, True, 20, 100),
        (1000.0, True, 20, 400),
    ],
)
def test_sweeps_fit_in_their_order(limit: float, again: bool, short: int, long: int) -> None:
    found = within(limit, STARTUP, SWEEPS, SECONDS)
    assert found.phases == (
        Fitting("survey", True),
        Fitting("layer fits", True),
        Fitting("again", again),
        Fitting("short", short > 0, short),
        Fitting("long", long > 0, long),
    )
    assert found.always == 70.0
    assert found.most == min(max(70.0, limit), 530.0)


@pytest.mark.parametrize(("minutes", "said"), [(1e-3, "takes longer:"), (1e6, "at most.")])
def test_the_plan_says_what_fits(take: Any, minutes: float, said: str) -> None:
    own = {"objective": "layer+logits", "metric": "sensitivity"}
    estimate = planned_estimate(take(**own, max_minutes=minutes))
    printed = table(estimate)
    assert "within `max_minutes`" in printed
    assert said in printed
    phases = to_json(estimate)["max_minutes"]["phases"]
    assert [phase["phase"] for phase in phases] == [own.name for own in estimate.sweeps[:-1]]
    assert phases[-1]["steps"] == (400 if minutes > 1 else 0)
    free = planned_estimate(take(**own))
    assert "max_minutes" not in table(free)
    assert to_json(free)["max_minutes"] is None
