"""What goes wrong for a user, said so that they can mend it."""

from collections.abc import Sequence

import click


class DamError(click.ClickException):
    """Base of every error this package raises on purpose.

    A click exception, so that `mergekit-yaml` and `mergekit-dam` print the message
    alone and exit with status 1; in process it is an ordinary exception whose `str`
    is the message. A message says what was required, where, what was got, the remedy.
    """

    def inside(self, place: str) -> "DamError":
        """The same error with the place where it came up, which the inner layer cannot know."""
        return DamError(f"{place}: {self.message}")


class ConfigError(DamError):
    """Everything that is wrong with a configuration, reported together."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{head} in the dam configuration:\n{lines}")


class CalibrationError(DamError):
    """Calibration text that is missing, unreadable, too short or of another vocabulary."""


class ArchitectureError(DamError):
    """A model whose forward pass cannot be cut into blocks, or whose parts do not fit."""
