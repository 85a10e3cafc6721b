"""How long an evaluation will take, told from its first batches."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mergekit_dam.tables import duration

FIRST = 3.0
"""Seconds of work after which there is enough to tell from."""


@dataclass
class Pace:
    """Counts what is done, and tells once how long the whole will take.

    Attributes:
        say: Prints a line.
        clock: Seconds.
        total: Everything that there is to do, in units of its own.
    """

    say: Callable[[str], None]
    clock: Callable[[], float] = time.perf_counter
    total: int = 0
    _done: int = 0
    _began: float | None = None
    _told: bool = False

    def starts(self) -> None:
        """Start the clock: what was done before, such as reading text, does not count."""
        self._began = self.clock()

    def done(self, amount: int) -> None:
        """Note that a batch is done."""
        assert self._began is not None
        self._done += amount
        spent = self.clock() - self._began
        if not self._told and spent > FIRST and self._done:
            self._told = True
            left = spent * max(0, self.total - self._done) / self._done
            self.say(f"about {duration(left)} left")
