"""What a merge tells while it runs, as numbers for a backend."""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence

from mergekit_dam.display.course import Course
from mergekit_dam.display.status import bytes_used
from mergekit_dam.streams.progress import Phase
from mergekit_dam.tracking.backend import Backend

LOG = logging.getLogger(__name__)

MERGE = "merge"
"""Group of the numbers on the merge as a whole, whose steps are seconds since it began."""


class Tracker:
    """Follows a merge.

    Args:
        backend: takes the numbers. If it fails, a line of the log says so, and the merge goes on.
        texts: names of the models with text, in their order.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        backend: Backend,
        texts: Sequence[str],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backend: Backend | None = backend
        self._texts, self._course = texts, Course(clock)

    def plan(self, phases: Sequence[Phase]) -> None:
        """Take note of all phases that may come."""
        self._course.plan(phases)

    def begin(self, name: str, done: int, steps: int | None) -> None:
        """Track a phase that begins."""
        if self._course.begin(name, done, steps):
            self._put_state()

    def show(self, text: str, step: int | None, share: float) -> None:
        """Track how the merge is when a step begins."""
        self._course.at(step, share)
        if step is not None:
            self._put_state()

    def advance(self, name: str, text: str) -> None:
        """Track the next step of a phase."""
        step = self._course.next_step(name)
        self.begin(name, 0, None)
        self.show(text, step, 0.0)

    def track(
        self, values: Mapping[str, float | Sequence[float]], step: int, group: str | None
    ) -> None:
        """Track numbers."""
        phase = self._course.phase
        own = group or (MERGE if phase is None else phase.name)
        found: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, Sequence):
                each = zip(self._texts, value, strict=True)
                found |= {_word(f"{name} {text}"): number for text, number in each}
            else:
                found[_word(name)] = value
        self._put(_word(own), found, step)

    def close(self, *, failed: bool) -> None:
        """Close the backend, if it has not failed."""
        self._safely(lambda backend: backend.close(failed=failed))

    def _put_state(self) -> None:
        """Track the phase, the speed and the memory."""
        host, gpu = bytes_used()
        values = {"phase": (self._course.current or 0) + 1, "memory_bytes": host}
        if gpu:
            values["gpu_memory_bytes"] = gpu
        speed = self._course.speed
        known = {} if speed is None else {"tokens_per_second": speed}
        self._put(MERGE, {**values, **known}, round(self._course.gone))

    def _put(self, group: str, values: Mapping[str, float], step: int) -> None:
        self._safely(lambda backend: backend.put(group, values, step))

    def _safely(self, act: Callable[[Backend], None]) -> None:
        """Let the backend act; hours of a merge are not lost because its tracking fails."""
        if self._backend is None:
            return
        try:
            act(self._backend)
        except Exception as error:  # its type depends on the backend
            LOG.warning("the merge goes on, and is not tracked any more: %s", error)
            self._backend = None


def _word(text: str) -> str:
    """A name that every backend takes: `layer fits` is `layer_fits`."""
    return re.sub(r"\W+", "_", text).strip("_")
