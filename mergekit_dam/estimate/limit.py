"""What fits into `max_minutes`, by the times of an estimate.

A search decides the same by the times that it measures (`search.pace`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_dam.estimate.sweeps import Sweep


@dataclass(frozen=True)
class Fitting:
    """A phase of a merge whose time is limited.

    Attributes:
        phase: name of the sweep.
        fits: whether it is begun, because there is time for it or because it always is.
        steps: number of steps of a descent that there is time for; None of other sweeps.
    """

    phase: str
    fits: bool
    steps: int | None = None


@dataclass(frozen=True)
class Limited:
    """The phases of a merge within a time.

    Attributes:
        limit: seconds that the merge may take.
        always: seconds of what is always run.
        phases: every phase before writing, in order.
        most: seconds that the merge takes at most.
    """

    limit: float
    always: float
    phases: tuple[Fitting, ...]
    most: float


def within(
    limit: float, startup: float, sweeps: Sequence[Sweep], seconds: Sequence[float]
) -> Limited:
    """Which sweeps fit into a time; the last one, which writes, is always run.

    Args:
        limit: seconds that the merge may take.
        startup: seconds before the first sweep.
        sweeps: all sweeps of a search, in order.
        seconds: the time of each.
    """
    pairs = list(zip(sweeps, seconds, strict=True))
    always = startup + sum(took for sweep, took in pairs if sweep.certain and not sweep.steps)
    left = limit - always
    fitting, before = [], 0
    for sweep, took in pairs[:-1]:
        if sweep.steps:
            enough = min(sweep.steps, max(0, int(left * sweep.steps / took)))
            # A descent that was cut short is the last, and so is one that would be no longer.
            steps = enough if enough > before else 0
            left, before = (left - took, steps) if steps == sweep.steps else (0.0, sweep.steps)
            fitting.append(Fitting(sweep.name, steps > 0, steps))
        else:
            fitting.append(Fitting(sweep.name, sweep.certain or took <= left))
    return Limited(limit, always, tuple(fitting), min(max(limit, always), startup + sum(seconds)))
