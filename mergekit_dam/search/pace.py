"""The pace of a search: when a descent is judged, and what there is time for."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

from mergekit_dam.parameters import RunParameters
from mergekit_dam.streams import distributed, progress
from mergekit_dam.tables import duration

LOOKS = 8
"""How often a descent is judged on held-out data, about."""

SETTLED = 3
"""Steps of a descent after which it is known how many more there is time for: the first is slow."""


def judged_steps(steps: int) -> frozenset[int]:
    """The steps, counted from 1, after which a descent is judged: the last one is among them."""
    every = max(1, round(steps / LOOKS))
    return frozenset((*range(every, steps + 1, every), steps))


@dataclass
class Took:
    """How long something takes: the longest of the last two times, or else a guess."""

    guess: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=2))

    @property
    def seconds(self) -> float:
        """Seconds that the next time may take."""
        return max(self.recent, default=self.guess)


@dataclass
class Pace:
    """How long the parts of a search take, and how many there is time for.

    Of several processes, the first one decides.

    Attributes:
        ends: when the merge has to be written, by the clock; infinite without `max_minutes`.
        clock: tells the time in seconds.
        writing: seconds that merging and writing may take in the end.
        step, look: what a step of a descent takes, and a judgement of the whole model.
        left_out: sentences about what there was no time for.
    """

    ends: float = inf
    clock: Callable[[], float] = time.perf_counter
    writing: float = 0.0
    step: Took = field(default_factory=Took)
    look: Took = field(default_factory=Took)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, settings: RunParameters, started: float | None) -> "Pace":
        """The pace of a search.

        Args:
            settings: parameters of the merge.
            started: when the merge began, by `time.perf_counter`; now by default.
        """
        if settings.max_minutes is None:
            return cls()
        return cls(
            (time.perf_counter() if started is None else started) + 60 * settings.max_minutes
        )

    def surveyed(self, seconds: float) -> None:
        """Take the time of the survey for what was not measured yet.

        The survey reads and merges every weight once, and runs the sequences that judge, as a
        judgement does. A step goes through the model twice, and so does merging and writing, if
        bytes are written as fast as they are read.
        """
        self.look.guess = seconds
        self.writing = self.step.guess = 2 * seconds

    @contextmanager
    def measured(self, took: Took) -> Iterator[None]:
        """Measure a step or a judgement."""
        began = self.clock()
        yield
        took.recent.append(self.clock() - began)

    def cost(self, steps: int) -> float:
        """Seconds of some steps of a descent, with their judgements."""
        return steps * self.step.seconds + len(judged_steps(steps)) * self.look.seconds

    def steps(self, most: int) -> int:
        """How many steps of a descent there is time for; at most `most`."""
        if self.ends == inf:
            return most
        return distributed.from_first(lambda: self._steps_until(self._left(), most))

    def allows(self, what: str, seconds: float) -> bool:
        """Whether there is time for something; what there is no time for is said and recorded."""
        if self.ends == inf:
            return True
        needed, left = distributed.from_first(lambda: (seconds, max(0.0, self._left())))
        if needed <= left:
            return True
        sentence = (
            f"no time for {what}: it needs {duration(needed)}, and `max_minutes` leaves "
            f"{duration(left)} before the merge is written"
        )
        self.left_out.append(sentence)
        progress.say(sentence)
        return False

    def _left(self) -> float:
        """Seconds until writing has to begin."""
        return self.ends - self.clock() - self.writing

    def _steps_until(self, left: float, most: int) -> int:
        return next((n for n in range(most, 0, -1) if self.cost(n) <= left), 0)
