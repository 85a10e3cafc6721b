"""What the demo measured."""

from dataclasses import dataclass

from mergekit_dam.demo.texts import DOMAINS
from mergekit_dam.evaluate import format_table


@dataclass(frozen=True)
class DemoResult:
    """Held-out losses of the demo's models.

    Attributes:
        losses: nats per token, per model (`base`, the domains, the merge methods) and domain.
    """

    losses: dict[str, dict[str, float]]

    def recovery(self, model: str) -> float:
        """Mean over the domains of how much of what averaging loses a model wins back.

        `linear` has 0; a model as good as the own specialist on every domain has 1.
        """
        linear, own = self.losses["linear"], self.losses[model]
        shares = (
            (linear[domain] - own[domain]) / (linear[domain] - self.losses[domain][domain])
            for domain in DOMAINS
        )
        return sum(shares) / len(DOMAINS)

    def table(self) -> str:
        """Rows are models, columns are domains and the recovery."""
        rows = [
            (model, [*own.values(), self.recovery(model)]) for model, own in self.losses.items()
        ]
        return format_table(["nats per token", *DOMAINS, "recovery"], rows)
