"""What a merge tells while it runs: its phases, the step that it is at, lines and numbers.

All that takes long calls these functions. Where they are shown is the display's business, which
`shown_on` sets; without one (`--quiet`), lines go to the log alone. Numbers go to a tracker, if
`tracked_by` has set one.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
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


class Listener(Protocol):
    """Follows what a merge does."""

    def plan(self, phases: Sequence[Phase]) -> None:
        """Take note of all phases that may come."""

    def begin(self, name: str, done: int, steps: int | None) -> None:
        """Begin a phase; as `begin`."""

    def show(self, text: str, step: int | None, share: float) -> None:
        """Show what is under way; as `show`."""

    def advance(self, name: str, text: str) -> None:
        """Show the next step of a phase, which begins with its first."""


class Display(Listener, Protocol):
    """Shows people what a merge does."""

    def say(self, text: str) -> None:
        """Print a line that stays."""

    def urge(self, text: str) -> bool:
        """Show a line from within a signal's handler, if that can be done."""


class Tracker(Listener, Protocol):
    """Follows a merge by numbers."""

    def track(
        self, values: Mapping[str, float | Sequence[float]], step: int, group: str | None
    ) -> None:
        """Take note of numbers; as `track`."""


_displays: list[Display] = []
_trackers: list[Tracker] = []


@contextmanager
def shown_on(display: Display) -> Iterator[None]:
    """Show everything on a display while the body runs."""
    _displays.append(display)
    try:
        yield
    finally:
        _displays.remove(display)


@contextmanager
def tracked_by(tracker: Tracker) -> Iterator[None]:
    """Let a tracker follow everything while the body runs."""
    _trackers.append(tracker)
    try:
        yield
    finally:
        _trackers.remove(tracker)


def _listeners() -> list[Listener]:
    return [*_displays[-1:], *_trackers]


def plan(phases: Sequence[Phase]) -> None:
    """Tell all phases that may come, in order."""
    for listener in _listeners():
        listener.plan(phases)


def begin(name: str, *, done: int = 0, steps: int | None = None) -> None:
    """Begin a phase, or let the one that runs have another number of steps.

    Args:
        done: steps that an earlier run has done.
        steps: number of steps, if it is not the one that was planned.
    """
    for listener in _listeners():
        listener.begin(name, done, steps)


def show(text: str, *, step: int | None = None, share: float = 0.0) -> None:
    """Show what is under way.

    Args:
        step: number of the step that is under way, from 0 on; the same as before by default.
        share: share of the step that is done.
    """
    LOG.debug(text)
    for listener in _listeners():
        listener.show(text, step, share)


def advance(name: str, text: str) -> None:
    """Show the next step of a phase, which begins with its first."""
    for listener in _listeners():
        listener.advance(name, text)


def track(
    values: Mapping[str, float | Sequence[float]], *, step: int, group: str | None = None
) -> None:
    """Tell numbers to what tracks the merge, if anything does.

    Args:
        values: numbers by name; a sequence has one for every model with text, in their order.
        step: number of the step that they are of, in their group.
        group: what they belong to; the phase that runs by default.
    """
    for tracker in _trackers:
        tracker.track(values, step, group)


def say(text: str) -> None:
    """Say something that stays on the screen; without a display, in the log."""
    if not _displays:
        LOG.info(text)
    for display in _displays[-1:]:
        display.say(text)


def urge(text: str) -> bool:
    """Show a line at once from within a signal's handler; False if that cannot be done here."""
    return bool(_displays) and _displays[-1].urge(text)
