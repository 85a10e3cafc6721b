"""What there is to show at a moment, as words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from mergekit_dam.display.course import Course
from mergekit_dam.streams.progress import Phase
from mergekit_dam.tables import duration, size


def outlook(phases: Sequence[Phase]) -> str:
    """The phases that come."""
    named = (f"{own.name} ({own.condition})" if own.condition else own.name for own in phases)
    return f"phases: {'; '.join(named)}"


def bytes_used() -> tuple[int, int]:
    """Memory of this process, and that of the GPU: 0 if it uses none."""
    gpu = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0  # 0 before it is used
    return psutil.Process().memory_info().rss, gpu


def memory_used() -> str:
    """Memory of this process, and of the GPU if it uses one."""
    host, gpu = bytes_used()
    return f"{size(host)} memory" + (f", {size(gpu)} on the GPU" if gpu else "")


@dataclass
class Status:
    """What there is to show.

    Attributes:
        course: how far the merge is.
        text: what is under way.
        memory: tells the memory that is used.
    """

    course: Course
    text: str = ""
    memory: Callable[[], str] = memory_used

    @property
    def place(self) -> str:
        """The phase, its number and the step."""
        phase, course = self.course.phase, self.course
        if phase is None or course.current is None:
            return "preparing"
        named = f"{phase.name} ({course.current + 1} of {len(course.phases)})"
        return f"{named}, {phase.unit} {self.step} of {len(phase.work)}" if phase.work else named

    @property
    def step(self) -> int:
        """The step that is under way, counted from 1."""
        phase = self.course.phase
        return min(self.course.step + 1, len(phase.work)) if phase is not None else 0

    @property
    def times(self) -> str:
        """The share of the phase that is done, and the time that is gone and left."""
        gone = f"{self.course.fraction:.0%} of the phase, {duration(self.course.gone)} gone"
        left = self.course.left
        if left is None:
            return gone
        later = self.course.conditional
        return f"{gone}, {duration(left)} left" + (f" without {later}" if later else "")

    @property
    def use(self) -> str:
        """Tokens per second where they are known, and memory."""
        speed = self.course.speed
        return self.memory() if speed is None else f"{speed:,.0f} tokens/s, {self.memory()}"
