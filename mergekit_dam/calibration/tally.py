"""Counts of what was met while rows became documents."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """What was left out of rows, or replaced, so that it can be said.

    Attributes:
        padding: Number of token ids that were padding.
        parts: Number of parts of messages that were no text, by their type, such as "image".
        dated: Whether a chat template asked for today's date.
    """

    padding: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    dated: str = ""

    def sentences(self) -> Iterator[str]:
        """What was left out or replaced."""
        if self.padding:
            yield f"{self.padding:,} token ids of padding were left out"
        for kind, count in sorted(self.parts.items()):
            yield f"{count:,} parts of messages (type {kind!r}) were left out: they are no text"
        if self.dated:
            yield self.dated
