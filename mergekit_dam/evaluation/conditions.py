"""Conditions on an evaluation, such as `german > 3.1`; nothing slow is imported."""

import difflib
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.named import MEAN

if TYPE_CHECKING:
    from mergekit_dam.evaluation.evaluation import Evaluation
    from mergekit_dam.evaluation.losses import Measured

LOSS, PERPLEXITY, DIFFERENCE, RECOVERY = QUANTITIES = (
    "loss",
    "perplexity",
    "difference",
    "recovery",
)
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(rf"\s*(?:({'|'.join(QUANTITIES)})\s+)?(\S.*?)\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """A number that no model may have.

    Attributes:
        quantity: One of `QUANTITIES`.
        text: Name of a text, or `mean`.
        comparison: `>`, `>=`, `<` or `<=`.
        limit: What is compared with.
    """

    quantity: str
    text: str
    comparison: str
    limit: float

    def __str__(self) -> str:
        quantity = "" if self.quantity == LOSS else f"{self.quantity} "
        return f"{quantity}{self.text} {self.comparison} {self.limit:g}"

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parse `[QUANTITY] TEXT COMPARISON NUMBER`.

        Raises:
            DamError: It has another form.
        """
        found = _FORM.fullmatch(text)
        try:
            limit = float(found[4]) if found else None
        except ValueError:
            limit = None
        if found is None or limit is None or limit != limit:
            raise DamError(
                f"--fail-if {text!r}: required `TEXT > NUMBER` (or >=, <, <=), where TEXT is the "
                f"name of a text or `{MEAN}`, with {', '.join(QUANTITIES[1:])} in front for "
                f"another number than the loss: `german > 3.1`, `recovery {MEAN} < 0.8`"
            )
        return cls(found[1] or LOSS, found[2], found[3], limit)

    def check(self, texts: Collection[str], references: Collection[str], *, compared: bool) -> None:
        """Refuse a condition on something that is not measured.

        Args:
            texts: Names of all texts.
            references: Names of the texts that have a specialist.
            compared: Whether there is a baseline.

        Raises:
            DamError: With what is missing.
        """
        if self.quantity == DIFFERENCE and not compared:
            raise DamError(f"--fail-if `{self}`: required a --baseline to take differences from")
        if self.quantity == RECOVERY and not references:
            raise DamError(f"--fail-if `{self}`: required a --reference NAME=MODEL, a specialist")
        known = [*(references if self.quantity == RECOVERY else texts), MEAN]
        if self.text not in known:
            close = difflib.get_close_matches(self.text, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(known)}"
            raise DamError(f"--fail-if `{self}`: there is no text {self.text!r}; {hint}")

    def failures(self, result: "Evaluation") -> list[str]:
        """Sentences about the models for which the condition holds.

        Where there is no number, as for a text that models read in other tokens, it holds, too.
        """
        return [
            f"{model}: {self.quantity} {self.text} is "
            f"{'not known' if own is None else f'{own.value:.4g}'} ({self})"
            for model in result.models
            if model != result.baseline
            for own in [self._numbers(result, model)[self.text]]
            if own is None or _COMPARISONS[self.comparison](own.value, self.limit)
        ]

    def _numbers(self, result: "Evaluation", model: str) -> Mapping[str, "Measured | None"]:
        if self.quantity == DIFFERENCE:
            return result.difference(model)
        if self.quantity == RECOVERY:
            return result.recovery(model)
        losses = result.loss(model)
        if self.quantity == LOSS:
            return losses
        return {text: own and own.perplexity for text, own in losses.items()}
