"""Where a merge is, and the time that is left, by a clock that is made up."""

import pytest

from mergekit_dam.display.course import OVERDUE, Course
from mergekit_dam.streams.progress import Phase


class Clock:
    """Tells a time that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def begun(clock: Clock, *phases: Phase) -> Course:
    course = Course(clock)
    course.plan(phases)
    course.begin(phases[0].name, 0, None)
    return course


def pass_steps(clock: Clock, course: Course, steps: range, seconds: float) -> None:
    for step in steps:
        course.at(step, 0.0)
        clock.now += seconds
        course.at(step, 1.0)


def test_steps_of_equal_work_take_as_long_as_those_before() -> None:
    clock = Clock()
    course = begun(clock, Phase("layer fits", (5.0,) * 10))
    assert course.left is None
    pass_steps(clock, course, range(2), 30.0)
    assert course.left == pytest.approx(8 * 30)
    assert course.fraction == pytest.approx(0.2)
    assert course.gone == 60


def test_work_and_not_the_number_of_steps_gives_the_time_that_is_left() -> None:
    clock = Clock()
    course = begun(clock, Phase("layer fits", (1.0, 10.0, 10.0, 40.0)))
    pass_steps(clock, course, range(2), 20.0)  # the second has ten times the work
    assert course.left == pytest.approx(50 / (10 / 20))


def test_a_slow_beginning_is_forgotten() -> None:
    clock = Clock()
    course = begun(clock, Phase("layer fits", (1.0,) * 20))
    pass_steps(clock, course, range(1), 500.0)
    pass_steps(clock, course, range(1, 6), 10.0)
    assert course.left == pytest.approx(14 * 10)


def test_time_that_passes_without_news_is_taken_off_but_never_all() -> None:
    clock = Clock()
    course = begun(clock, Phase("layer fits", (1.0,) * 10))
    pass_steps(clock, course, range(5), 10.0)
    clock.now += 20
    assert course.left == pytest.approx(30)
    clock.now += 1000
    assert course.left == pytest.approx(OVERDUE * 50)


def test_phases_that_always_follow_count_and_others_are_named() -> None:
    clock = Clock()
    survey, fits = Phase("survey", (1.0,) * 4), Phase("layer fits", (10.0,) * 4)
    course = begun(clock, survey, fits, Phase("descent", (99.0,), condition="if that pays"))
    pass_steps(clock, course, range(2), 3.0)
    assert course.left == pytest.approx((2 + 40) * 3)
    assert course.conditional == "descent"


def test_a_phase_begins_at_the_speed_of_those_before_and_then_has_its_own() -> None:
    clock = Clock()
    course = begun(clock, Phase("survey", (1.0,) * 4), Phase("layer fits", (10.0,) * 10))
    pass_steps(clock, course, range(4), 1.0)
    assert course.begin("layer fits", 0, None)
    assert course.left == pytest.approx(100)
    pass_steps(clock, course, range(2), 30.0)
    assert course.left == pytest.approx(8 * 30)


def test_steps_of_an_earlier_run_say_nothing_about_speed() -> None:
    clock = Clock()
    course = begun(clock, Phase("survey", ()), Phase("layer fits", (1.0,) * 10, tokens=700))
    course.begin("layer fits", 6, None)
    assert course.fraction == pytest.approx(0.6)
    assert course.left is None
    pass_steps(clock, course, range(6, 8), 7.0)
    assert course.left == pytest.approx(2 * 7)
    assert course.speed == pytest.approx(100)


def test_a_phase_may_get_another_number_of_steps() -> None:
    clock = Clock()
    course = begun(clock, Phase("descent", (2.0,) * 100))
    pass_steps(clock, course, range(5), 10.0)
    assert not course.begin("descent", 0, 10)
    assert course.left == pytest.approx(5 * 10)


def test_a_phase_that_nobody_planned_has_no_time_left() -> None:
    clock = Clock()
    course = begun(clock, Phase("survey", (1.0,)))
    assert course.begin("another", 0, None)
    course.at(3, 0.5)
    assert course.left is None
    assert course.fraction == 0
