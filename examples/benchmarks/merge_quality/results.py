"""Results: recovery, the table, JSON and Markdown.

Recovery of a merged model in a domain is

    (CE_linear - CE_merged) / (CE_linear - CE_own_specialist)

with CE the cross-entropy on that domain's text, in nats per token, and `linear` the plain average
with equal weights, written like the other merges. 0 is the plain average, 1 every specialist at
home. A domain where the specialist is no better than the average has no recovery.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from examples.benchmarks.measuring.tables import listed, markdown_table, named, number

LINEAR = "linear"
BASE = "base"
OWN = "own specialist"

DEFINITION = (
    "Recovery of a domain is (CE_linear - CE_merged) / (CE_linear - CE_own_specialist), CE being "
    "the cross-entropy on its text and linear the average with equal weights: 0 is that average, 1 "
    "every specialist at home. The column `recovery` is the mean over the domains on test text, "
    "`validation` the same on the text that a method's best point was chosen by."
)
COST = (
    "Seconds and peak resident memory (GB of 1e9 bytes, files mapped into memory included) are "
    "those of the chosen merge, run in a process of its own from start to exit; `of` is how many "
    "points were tried."
)

Losses = Mapping[str, float]
"""Cross-entropy in nats per token, by domain."""


def recovery(losses: Losses, *, linear: Losses, own: Losses) -> dict[str, float | None]:
    """Recovery by domain; None where the specialist has no advantage to win back."""
    return {
        domain: (linear[domain] - loss) / (linear[domain] - own[domain])
        if linear[domain] > own[domain]
        else None
        for domain, loss in losses.items()
    }


def mean(values: Mapping[str, float | None]) -> float | None:
    """Mean over the domains that have a value, each counted the same."""
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One merge of a method's grid.

    Attributes:
        parameters: the parameters of this point.
        seconds, peak_bytes: cost of the merge.
        validation: its losses on validation text; empty if it failed before.
        reason: why it failed; empty if it did not.
    """

    parameters: Mapping[str, Any]
    seconds: float | None = None
    peak_bytes: int | None = None
    validation: Losses = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: name of the method.
        test: losses on test text; empty if the method failed.
        trials: every point of the method's grid.
        chosen: the trial whose merge was measured on test text.
        reason: why there is nothing to report; empty if there is.
    """

    name: str
    test: Losses = field(default_factory=dict)
    validation: Losses = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    chosen: Trial | None = None
    reason: str = ""


def best(trials: Sequence[Trial], *, linear: Losses, own: Losses) -> Trial | None:
    """The trial with the most recovery on validation text; the earlier of equals.

    Where there is no recovery (for `linear` itself, or where no specialist has an advantage), the
    trial with the least mean loss.
    """
    sound = [trial for trial in trials if not trial.reason]

    def rank(trial: Trial) -> tuple[float, float]:
        share = mean(recovery(trial.validation, linear=linear, own=own)) if linear else None
        return (
            -math.inf if share is None else share,
            -sum(trial.validation.values()),
        )

    return max(sound, key=rank, default=None)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a run found.

    Attributes:
        domains: in the order of the columns.
        rows: in the order of the table.
        texts: sentences that describe the split.
        settings: the settings, the machine and the command; as JSON takes it.
    """

    domains: tuple[str, ...]
    rows: tuple[Row, ...]
    texts: tuple[str, ...]
    settings: Mapping[str, Any]

    def recovery(self, row: Row, part: str = "test") -> dict[str, float | None]:
        """Recovery of a row by domain; None where it is not known."""
        losses, linear, own = (
            getattr(found, part) if found else {}
            for found in (row, self._row(LINEAR), self._row(OWN))
        )
        if not (losses and linear and own):
            return dict.fromkeys(self.domains)
        return recovery(losses, linear=linear, own=own)

    def table(self) -> str:
        """The rows as a Markdown table, padded to be read as it is."""
        return markdown_table(self._header(), [self._cells(row) for row in self.rows])

    def markdown(self) -> str:
        """A page: the table and how it was made."""
        texts = [f"- {line}" for line in self.texts]
        parts = ["# Merges compared", self.table(), DEFINITION, COST, "## Texts", "\n".join(texts)]
        return "\n\n".join([*parts, "## Run", listed(self.settings)]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it; unrounded."""
        return {
            "definition": DEFINITION,
            "cost": COST,
            "settings": dict(self.settings),
            "texts": list(self.texts),
            "domains": list(self.domains),
            "rows": [
                {
                    **asdict(row),
                    "recovery": mean(self.recovery(row)),
                    "recovery_by_domain": self.recovery(row),
                    "validation_recovery": mean(self.recovery(row, "validation")),
                }
                for row in self.rows
            ],
        }

    def _row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def _header(self) -> list[str]:
        judged = ("nats per token", *self.domains, "recovery", "by domain", "validation")
        return [*judged, "seconds", "GB", "of", "parameters, or why it failed"]

    def _cells(self, row: Row) -> list[str]:
        own = self.recovery(row)
        chosen = row.chosen
        return [
            row.name,
            *(number(row.test.get(domain), 3) for domain in self.domains),
            number(mean(own), 3),
            " ".join(number(value, 2) for value in own.values()) if mean(own) is not None else "",
            number(mean(self.recovery(row, "validation")), 3),
            number(chosen.seconds if chosen else None, 1),
            number(chosen.peak_bytes / 1e9 if chosen and chosen.peak_bytes else None, 2),
            str(len(row.trials) or ""),
            row.reason or (named(chosen.parameters) if chosen else ""),
        ]
