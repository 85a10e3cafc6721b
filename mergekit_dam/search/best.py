"""The best coefficients that a search has found so far."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_dam.coefficients.correction import Corrections
from mergekit_dam.coefficients.record import MergeRecord, Trial
from mergekit_dam.journal import Journal
from mergekit_dam.search.judge import Verdict
from mergekit_dam.streams import progress

TRIALS = "trials"
"""What the journal knows of all trials so far, and the group of their numbers."""

DESCENT = "logits"
"""Beginning of the names of trials that are descents."""

LOG = logging.getLogger(__name__)

SACRIFICE = 0.1
"""Rise of one model's KL that a trial after layer fits may cost, relative to the start's mean."""


@dataclass
class Best:
    """The best coefficients so far, the verdict on them, and the trials.

    Attributes:
        journal: keeps it after every trial.
    """

    record: MergeRecord
    verdict: Verdict
    trials: list[Trial]
    journal: Journal

    @property
    def left(self) -> float:
        """The fraction of the start's held-out KL that is left."""
        start = self.trials[0].mean_held_out_kl
        return self.verdict.mean / start if start else 0.0

    @property
    def allowance(self) -> float:
        """Rise of one model's KL that a trial may cost; only a start is not guarded."""
        return SACRIFICE * self.trials[0].mean_held_out_kl if self.improved else math.inf

    @property
    def improved(self) -> bool:
        """Whether something better than the start was found."""
        return any(trial.kept for trial in self.trials[1:])

    @property
    def descents(self) -> int:
        """Number of descents among the trials."""
        return sum(trial.name.startswith(DESCENT) for trial in self.trials)

    def paid(self, fraction: float) -> bool:
        """Whether the last trial ran to its end and lowered the mean KL by a fraction."""
        *before, last = self.trials
        lowest = [trial.mean_held_out_kl for trial in before if trial.kept][-1]
        return not last.ended and self.verdict.mean <= (1 - fraction) * lowest

    def consider(
        self,
        name: str,
        record: MergeRecord,
        verdict: Verdict,
        started: float,
        *,
        ended: str = "",
        **details: float,
    ) -> None:
        """Record a trial, and keep its coefficients if the judge prefers them."""
        kept = verdict.better_than(self.verdict, self.allowance)
        seconds = time.perf_counter() - started
        self.trials.append(Trial(name, kept, verdict.losses, verdict.mean, seconds, details, ended))
        decision = "kept" if kept else "dropped"
        LOG.info("%s: held-out KL %.4g, %s, %.1f s", name, verdict.mean, decision, seconds)
        progress.track(verdict.numbers, step=len(self.trials) - 1, group=TRIALS)
        lost = self.record if kept else record
        if kept:
            self.record, self.verdict = record, verdict
        if lost.corrections is not None and lost.corrections is not self.record.corrections:
            lost.corrections.discard()
        self.keep()

    def keep(self) -> None:
        """Keep it for a next run."""
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        verdict = dataclasses.asdict(self.verdict)
        names = " and ".join(f"`{trial.name}`" for trial in self.trials)
        self.journal.put(
            TRIALS,
            {"record": self.record.state, "verdict": verdict, "trials": trials},
            said=f"{names} {'was' if len(trials) == 1 else 'were'} tried",
        )

    @classmethod
    def kept(cls, journal: Journal) -> "Best | None":
        """What an earlier run has kept; None if it has not judged anything."""
        state = journal.get(TRIALS)
        if state is None:
            return None
        verdict = Verdict.of_state(state["verdict"])
        trials = [Trial.of_state(trial) for trial in state["trials"]]
        return cls(record_of(state["record"], journal), verdict, trials, journal)


def record_of(state: Mapping[str, Any], journal: Journal) -> MergeRecord:
    """The record that had a state, with its corrections."""
    corrections = Corrections.of_state(state["corrections"], journal.remove)
    return MergeRecord.of_state(state, corrections)
