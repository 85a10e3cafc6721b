"""What a merge tells while it runs: its phases, the step that it is at, and lines that stay.

All that takes long calls these functions. Where they are shown is the display's business, which
`shown_on` sets; without one (`--quiet`), lines go to the log alone.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A part of a merge that takes long.

    Attributes:
        name: its name, by which it is begun.
        work: work of each step, about, in flops.
        unit: what a step is.
        tokens: tokens that pass in one step; 0 where that says nothing.
        condition: the condition under which it is run; empty if it always is.
    """

    name: str
    work: tuple[float, ...]
    unit: str = "block"
    tokens: int = 0
    condition: str = ""


class Display(Protocol):
    """Shows people what a merge does."""

    def plan(self, phases: Sequence[Phase]) -> None:
        """Take note of all phases that may come."""

    def begin(self, name: str, done: int, steps: int | None) -> None:
        """Begin a phase; as `begin`."""

    def show(self, text: str, step: int | None, share: float) -> None:
        """Show what is under way; as `show`."""

    def advance(self, name: str, text: str) -> None:
        """Show the next step of a phase, which begins with its first."""

    def say(self, text: str) -> None:
        """Print a line that stays."""

    def urge(self, text: str) -> bool:
        """Show a line from within a signal's handler, if that can be done."""


_displays: list[Display] = []


@contextmanager
def shown_on(display: Display) -> Iterator[None]:
    """Show everything on a display while the body runs."""
    _displays.append(display)
    try:
        yield
    finally:
        _displays.remove(display)


def plan(phases: Sequence[Phase]) -> None:
    """Tell all phases that may come, in order."""
    for display in _displays[-1:]:
        display.plan(phases)


def begin(name: str, *, done: int = 0, steps: int | None = None) -> None:
    """Begin a phase, or let the one that runs have another number of steps.

    Args:
        done: steps that an earlier run has done.
        steps: number of steps, if it is not the one that was planned.
    """
    for display in _displays[-1:]:
        display.begin(name, done, steps)


def show(text: str, *, step: int | None = None, share: float = 0.0) -> None:
    """Show what is under way.

    Args:
        step: number of the step that is under way, from 0 on; the same as before by default.
        share: share of the step that is done.
    """
    LOG.debug(text)
    for display in _displays[-1:]:
        display.show(text, step, share)


def advance(name: str, text: str) -> None:
    """Show the next step of a phase, which begins with its first."""
    for display in _displays[-1:]:
        display.advance(name, text)


def say(text: str) -> None:
    """Say something that stays on the screen; without a display, in the log."""
    if not _displays:
        LOG.info(text)
    for display in _displays[-1:]:
        display.say(text)


def urge(text: str) -> bool:
    """Show a line at once from within a signal's handler; False if that cannot be done here."""
    return bool(_displays) and _displays[-1].urge(text)
