"""The best coefficients that a search has found so far."""

import math
import time
from dataclasses import dataclass

from mergekit_dam.coefficients.record import MergeRecord, Trial
from mergekit_dam.search.judge import Verdict

SACRIFICE = 0.1
"""Rise of one model's KL that a trial after layer fits may cost, relative to the start's mean."""


@dataclass
class Best:
    """The best coefficients so far, the verdict on them, and the trials."""

    record: MergeRecord
    verdict: Verdict
    trials: list[Trial]

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
        lost = self.record if kept else record
        if kept:
            self.record, self.verdict = record, verdict
        if lost.corrections is not None and lost.corrections is not self.record.corrections:
            lost.corrections.discard()
