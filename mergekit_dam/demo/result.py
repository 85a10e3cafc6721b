"""The result of the demo."""

from dataclasses import dataclass

from mergekit_dam.demo.texts import DOMAINS
from mergekit_dam.evaluation.tables import format_table


@dataclass(frozen=True)
class DemoResult:
    """Held-out losses of the demo's models.

    Attributes:
        losses: Nats per token by model (`base`, the domains, the merge methods) and by domain.
    """

    losses: dict[str, dict[str, float]]

    def recovery(self, model: str) -> float:
        """Fraction of the loss from averaging that a model recovers, as a mean over the domains.

        `linear` has 0; a model that equals the domain's specialist on every domain has 1.
        """
        linear, own = self.losses["linear"], self.losses[model]
        shares = (
            (linear[domain] - own[domain]) / (linear[domain] - self.losses[domain][domain])
            for domain in DOMAINS
        )
        return sum(shares) / len(DOMAINS)

    def table(self) -> str:
        """The table: one row per model; one column per domain, and one for the recovery."""
        rows = [
            (model, [*own.values(), self.recovery(model)]) for model, own in self.losses.items()
        ]
        return format_table(["nats per token", *DOMAINS, "recovery"], rows)
