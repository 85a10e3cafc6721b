"""What a merge tells, as numbers for a backend."""

import pytest

from mergekit_dam.streams import progress
from mergekit_dam.streams.progress import Phase
from mergekit_dam.tracking.tracker import Tracker
from tests.kit.tracked import Noted

PHASES = [
    Phase("survey", (1.0,) * 3, "part", 100),
    Phase("layer fits, plain metric", (5.0,) * 3, "part", 100),
    Phase("write", (1.0,) * 2, "tensor"),
]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_phase_and_each_of_its_steps_have_speed_and_memory_by_seconds() -> None:
    noted, clock = Noted(), Clock()
    with progress.tracked_by(Tracker(noted, (), clock=clock)):
        progress.plan(PHASES)
        progress.begin("survey")
        for step in range(3):
            progress.show(f"block {step}", step=step)
            clock.now += 1.0
            progress.show("a tensor", share=0.5)  # no step begins with it
            clock.now += 1.0
        progress.begin("layer fits, plain metric")
        for _ in range(2):
            progress.advance("write", "a tensor")
    assert [step for step, _ in noted.curves["merge/phase"]] == [0, 0, 2, 4, 6, 6, 6, 6]
    assert [value for _, value in noted.curves["merge/phase"]] == [1, 1, 1, 1, 2, 3, 3, 3]
    assert noted.curves["merge/tokens_per_second"] == [(2, 50.0), (4, 50.0)]
    assert all(value > 1e6 for _, value in noted.curves["merge/memory_bytes"])


def test_numbers_belong_to_the_phase_that_runs_or_to_a_group() -> None:
    noted = Noted()
    with progress.tracked_by(Tracker(noted, ())):
        progress.track({"loss": 0.5}, step=0)
        progress.begin("layer fits, plain metric")
        progress.track({"held-out loss": 0.25, "rate": 1.0}, step=1)
        progress.track({"mean KL": 0.125}, step=7, group="trials")
    found = {name: own for name, own in noted.curves.items() if "memory" not in name}
    assert found == {
        "merge/loss": [(0, 0.5)],
        "merge/phase": [(0, 1)],
        "layer_fits_plain_metric/held_out_loss": [(1, 0.25)],
        "layer_fits_plain_metric/rate": [(1, 1.0)],
        "trials/mean_KL": [(7, 0.125)],
    }


def test_numbers_of_every_text_go_by_its_model() -> None:
    noted = Noted()
    with progress.tracked_by(Tracker(noted, ("org/math", "deutsch"))):
        progress.track({"KL": (0.1, 0.2)}, step=0, group="trials")
    assert noted.curves == {"trials/KL_org_math": [(0, 0.1)], "trials/KL_deutsch": [(0, 0.2)]}


def test_without_a_tracker_numbers_go_nowhere() -> None:
    noted = Noted()
    with progress.tracked_by(Tracker(noted, ())):
        pass
    progress.track({"loss": 0.5}, step=0, group="trials")
    progress.begin("survey")
    assert noted.curves == {}


def test_a_backend_that_fails_is_named_once_and_left(caplog: pytest.LogCaptureFixture) -> None:
    noted = Noted(failing=OSError(28, "No space left on device"))
    tracker = Tracker(noted, ())
    for step in range(3):
        tracker.track({"loss": 0.5}, step, "trials")
    tracker.close(failed=False)
    assert [own.getMessage() for own in caplog.records] == [
        "the merge goes on, and is not tracked any more: [Errno 28] No space left on device"
    ]
    assert (noted.curves, noted.closed) == ({}, [])


@pytest.mark.parametrize("failed", [True, False])
def test_the_backend_hears_how_the_merge_ended(failed: bool) -> None:
    noted = Noted()
    Tracker(noted, ()).close(failed=failed)
    assert noted.closed == [failed]
