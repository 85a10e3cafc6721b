"""A display for what is no terminal: a line where a phase begins, and about one a minute then."""

from collections.abc import Callable, Sequence
from typing import TextIO

from mergekit_dam.display.status import Status, outlook
from mergekit_dam.streams.progress import Phase

EVERY = 60.0
"""Seconds between two lines on a phase."""


class Plain:
    """Prints lines, which end with a line feed and hold no control characters.

    Args:
        stream: returns the stream for the lines; it is asked each time, since it may be replaced.
        status: what there is to show.
    """

    def __init__(self, stream: Callable[[], TextIO], status: Status) -> None:
        self._stream, self._status, self._last = stream, status, 0.0

    def plan(self, phases: Sequence[Phase]) -> None:
        """Take note of all phases that may come, and name them."""
        self._status.course.plan(phases)
        self.say(outlook(phases))

    def begin(self, name: str, done: int, steps: int | None) -> None:
        """Begin a phase."""
        if self._status.course.begin(name, done, steps):
            self._status.text = ""
            self._tell(self._status.place)

    def show(self, text: str, step: int | None, share: float) -> None:
        """Show what is under way if nothing was shown for a while."""
        self._status.text = text
        self._status.course.at(step, share)
        if self._status.course.clock() - self._last >= EVERY:
            own = self._status
            self._tell("; ".join([own.place, own.text, own.times, own.use]))

    def advance(self, name: str, text: str) -> None:
        """Show the next step of a phase."""
        step = self._status.course.next_step(name)
        self.begin(name, 0, None)
        self.show(text, step, 0.0)

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream(), flush=True)

    def urge(self, text: str) -> bool:
        """Nothing: a handler must not print to the stream."""
        return False

    def _tell(self, text: str) -> None:
        self._last = self._status.course.clock()
        self.say(text)
