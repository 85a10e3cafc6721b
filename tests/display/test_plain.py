"""Lines for what is no terminal."""

import io

from mergekit_dam.display.course import Course
from mergekit_dam.display.plain import Plain
from mergekit_dam.display.status import Status
from mergekit_dam.streams import progress
from mergekit_dam.streams.progress import Phase

PHASES = [
    Phase("survey", (1.0,) * 13, "part", 100),
    Phase("layer fits", (5.0,) * 13, "part", 100),
    Phase("descent of 20 steps", (3.0,) * 20, "step", condition="if 5% of the KL is left"),
]


def test_an_hour_is_a_line_for_each_phase_and_about_one_a_minute() -> None:
    now, stream = [0.0], io.StringIO()
    status = Status(Course(lambda: now[0]), memory=lambda: "5 GB memory")
    with progress.shown_on(Plain(lambda: stream, status)):
        progress.plan(PHASES)
        for phase in PHASES[:2]:
            progress.begin(phase.name)
            for step in range(13):
                for tensor in range(140):
                    progress.show(f"block {step} tensor {tensor}", step=step, share=tensor / 140)
                    now[0] += 1.0
    printed = stream.getvalue()
    lines = printed.splitlines()
    named, *others = lines
    assert named == ("phases: survey; layer fits; descent of 20 steps (if 5% of the KL is left)")
    assert "\r" not in printed
    assert "\x1b" not in printed
    assert others[0] == "survey (1 of 3), part 1 of 13"
    assert "layer fits (2 of 3), part 1 of 13" in others
    assert 58 <= len(others) <= 64
    assert others[-1].startswith("layer fits (2 of 3), part 13 of 13; block 12 tensor ")
    assert "without descent of 20 steps; " in others[-1]
    assert others[-1].endswith("tokens/s, 5 GB memory")


def test_the_steps_of_what_is_written_are_counted() -> None:
    stream = io.StringIO()
    status = Status(Course(lambda: 0.0))
    with progress.shown_on(Plain(lambda: stream, status)):
        progress.plan([Phase("write", (1.0,) * 3, "tensor")])
        seen = []
        for name in ("a", "b", "c"):
            progress.advance("write", f"merge {name}")
            seen.append(status.place)
    assert seen == [f"write (1 of 1), tensor {number} of 3" for number in (1, 2, 3)]
    assert len(stream.getvalue().splitlines()) == 2
