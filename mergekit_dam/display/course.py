"""How far a merge is, and the time that is left.

Each phase has an amount of work, known about. The work of a phase that is done, and the time that
it took, give its speed; the work that is left then gives the time. Phases that have not begun are
expected to run at the speed of the merge so far.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mergekit_dam.streams.progress import Phase

TRUSTED = 0.03
"""Share of a phase's work from which its own speed is trusted; before, it is that of the merge."""

RECENT, LUMP = 0.5, 0.08
"""What gives the speed of a phase, since its beginning is slower: the latest half of what is done,
and at least this share of the phase, since some steps are slower than others."""

OVERDUE = 0.1
"""Share of the time that was left when something was last heard, which is left at least."""


@dataclass
class Course:
    """The phases of a merge, and where in them it is.

    Attributes:
        clock: tells the time in seconds.
        phases: all phases that may come, in order.
        current: number of the phase that runs; None before the first.
        step: number of its step that is under way, from 0 on.
        share: share of this step that is done.
    """

    clock: Callable[[], float]
    phases: list[Phase] = field(default_factory=list)
    current: int | None = None
    step: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        self.started = self._began = self._heard = self.clock()
        self._skipped = 0
        self._heard_of = [(self._heard, 0.0)]
        self._work_before = self._seconds_before = 0.0

    def plan(self, phases: Sequence[Phase]) -> None:
        """Take note of all phases that may come."""
        self.phases = list(phases)

    def begin(self, name: str, done: int, steps: int | None) -> bool:
        """Begin a phase, or change the number of steps of the one that runs.

        Returns:
            Whether it is another phase than before.
        """
        number = next((k for k, own in enumerate(self.phases) if own.name == name), None)
        if number is None:
            self.phases.append(Phase(name, ()))
            number = len(self.phases) - 1
        if steps is not None:
            own = self.phases[number]
            each = own.work[0] if own.work else 1.0
            self.phases[number] = replace(own, work=(each,) * steps)
        if number == self.current:
            return False
        self._work_before += self._worked
        self._seconds_before += self._heard - self._began
        self.current, self.step, self.share, self._skipped = number, done, 0.0, done
        self._began = self._heard = self.clock()
        self._heard_of = [(self._heard, 0.0)]
        return True

    def runs(self, name: str) -> bool:
        """Whether a phase is the one that runs."""
        return self.phase is not None and self.phase.name == name

    def next_step(self, name: str) -> int:
        """Number of the step that follows in a phase, which may not have begun."""
        return self.step + 1 if self.runs(name) else 0

    def at(self, step: int | None, share: float) -> None:
        """Take note of the step that is under way, and of the share of it that is done."""
        self.step = self.step if step is None else step
        self.share = share
        self._heard = self.clock()
        self._heard_of.append((self._heard, self._worked))

    @property
    def phase(self) -> Phase | None:
        """The phase that runs."""
        return None if self.current is None else self.phases[self.current]

    @property
    def gone(self) -> float:
        """Seconds since the merge began."""
        return self.clock() - self.started

    @property
    def fraction(self) -> float:
        """Share of the work of the phase that is done."""
        whole = sum(self.phase.work) if self.phase is not None else 0.0
        return min(1.0, self._done / whole) if whole else 0.0

    @property
    def speed(self) -> float | None:
        """Tokens per second of the phase, where that is known."""
        steps, seconds = self.step - self._skipped, self._heard - self._began
        if self.phase is None or not self.phase.tokens or steps <= 0 or seconds <= 0:
            return None
        return self.phase.tokens * (steps + self.share) / seconds

    @property
    def left(self) -> float | None:
        """Seconds that are left of this phase and of those that always follow; None if unknown."""
        own = self._speed_of_phase()
        if own is None or self.phase is None or self.current is None:
            return None
        seconds = max(0.0, sum(self.phase.work) - self._done) / own
        waited = self.clock() - self._heard
        seconds = max(seconds - waited, OVERDUE * seconds)
        later = [own for own in self.phases[self.current + 1 :] if not own.condition]
        seconds_before = self._seconds_before + self._heard - self._began
        average = (self._work_before + self._worked) / seconds_before if seconds_before else own
        return seconds + sum(sum(phase.work) for phase in later) / (average or own)

    @property
    def conditional(self) -> str:
        """Name of the next phase that may follow or not, which `left` leaves out."""
        later = [] if self.current is None else self.phases[self.current + 1 :]
        return next((own.name for own in later if own.condition), "")

    def _speed_of_phase(self) -> float | None:
        """Work per second of the phase, or that of the merge before it is known."""
        work = self._worked
        if self.phase is not None and work > 0 and work >= TRUSTED * sum(self.phase.work):
            since = min(RECENT * work, work - LUMP * sum(self.phase.work))
            known = bisect.bisect(self._heard_of, since, key=lambda heard: heard[1]) - 1
            then, worked = self._heard_of[max(0, known)]
            if self._heard > then:
                return (work - worked) / (self._heard - then)
        return self._work_before / self._seconds_before if self._work_before else None

    @property
    def _done(self) -> float:
        if self.phase is None:
            return 0.0
        work = self.phase.work
        inside = self.share * work[self.step] if self.step < len(work) else 0.0
        return sum(work[: self.step]) + inside

    @property
    def _worked(self) -> float:
        """Work of the phase that this run has done."""
        return self._done - (sum(self.phase.work[: self._skipped]) if self.phase else 0.0)
