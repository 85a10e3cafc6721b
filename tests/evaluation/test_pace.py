"""The time that is left is told once, from the work that is done."""

from mergekit_dam.evaluation.pace import Pace


def test_the_time_left_is_told_once_and_in_proportion_to_what_is_left() -> None:
    said: list[str] = []
    now = [0.0]
    pace = Pace(said.append, clock=lambda: now[0], total=100)
    pace.starts()
    for _ in range(10):
        now[0] += 2
        pace.done(10)
    assert said == ["about 16.0 s left"]


def test_an_evaluation_of_seconds_says_nothing() -> None:
    said: list[str] = []
    pace = Pace(said.append, clock=lambda: 0.0, total=10)
    pace.starts()
    pace.done(10)
    assert said == []
