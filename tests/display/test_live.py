"""The lines on a terminal."""

import io
import logging
import sys

import pytest
from rich.console import Console

from mergekit_dam.display.course import Course
from mergekit_dam.display.live import OnTerminal
from mergekit_dam.display.status import Status
from mergekit_dam.streams import progress
from mergekit_dam.streams.progress import Phase

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""What hides the cursor of a terminal, and what shows it again."""


def display(width: int, *, terminal: bool = True) -> tuple[OnTerminal, Status, io.StringIO]:
    now, file = iter(range(0, 100_000, 10)), io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    status = Status(Course(lambda: float(next(now))), memory=lambda: "51.23 GB memory")
    return OnTerminal(console, status), status, file


@pytest.mark.parametrize("width", [60, 120])
def test_it_has_four_lines_that_fit_the_terminal(width: int) -> None:
    own, status, _ = display(width)
    course = status.course
    course.plan(
        [
            Phase("layer fits", (1.0,) * 50, "part", 4096),
            Phase("descent of 400 steps", (1.0,), condition="if that pays"),
        ]
    )
    course.begin("layer fits", 0, None)
    for step in range(20):
        course.at(step, 0.5)
    status.text = "block 20/48 mlp.down_proj.weight 0.0352 -> 0.0281" + " and more" * 9
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(own.rendered())
    lines = capture.get().splitlines()
    assert len(lines) == 4
    assert all(len(line) <= width for line in lines)
    assert lines[0] == "layer fits (1 of 2), part 20 of 50"
    assert "39%" in lines[1]
    assert "left" in lines[1] or lines[1].endswith("…")
    assert lines[2].startswith("block 20/48 mlp.down_proj.weight 0.0352 -> 0.0281")
    assert lines[2].endswith("…")
    assert lines[3].endswith("tokens/s, 51.23 GB memory")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit, ValueError])
def test_the_cursor_is_back_and_the_lines_are_gone_however_it_ends(
    error: type[BaseException] | None,
) -> None:
    own, _, file = display(80)
    stock = sys.stderr

    def body() -> None:
        with own.open(), progress.shown_on(own):
            progress.plan([Phase("survey", (1.0,))])
            progress.begin("survey")
            progress.show("block 1/1", step=0)
            assert sys.stderr is not stock
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(error):
            body()
    printed = file.getvalue()
    assert printed.count(HIDE) == printed.count(SHOW) == 1
    assert printed.rindex(SHOW) > printed.rindex("survey (1 of 1)")
    assert "\x1b[2K" in printed[printed.rindex("survey (1 of 1)") :]  # lines are erased
    assert sys.stderr is stock


def test_lines_of_the_log_go_above_what_is_drawn() -> None:
    own, _, file = display(80)
    handler = logging.StreamHandler(sys.stderr)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with own.open(), progress.shown_on(own):
            progress.begin("survey")
            logging.getLogger("a").warning("a warning of the log")
        assert handler.stream is sys.stderr
    finally:
        root.removeHandler(handler)
    assert "a warning of the log\n" in file.getvalue()


def test_what_a_handler_of_a_signal_has_to_say_is_drawn() -> None:
    own, _, _ = display(80)

    def drawn() -> str:
        file = io.StringIO()
        Console(file=file).print(own.rendered())
        return file.getvalue()

    with own.open(), progress.shown_on(own):
        assert not progress.urge("too early to draw")
        progress.begin("descent")
        assert progress.urge("ends after this step")
        own.begin("descent of 20 steps", 0, None)  # too soon to be drawn before
        assert "ends after this step" in drawn()
        progress.begin("write")  # by then it has ended
        assert "ends after this step" not in drawn()
