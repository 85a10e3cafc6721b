"""What goes wrong for a user, said so that they can mend it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click


class DamError(click.ClickException):
    """Base of every error this package raises on purpose.

    A click exception, so that `mergekit-yaml` and `mergekit-dam` print the message
    alone and exit with status 1; in process it is an ordinary exception whose `str`
    is the message. A message says what was required, where, what was got, the remedy.
    """

    def inside(self, place: str) -> "DamError":
        """The same error with the place where it came up, which the inner layer cannot know."""
        return type(self)(f"{place}: {self.message}")


class ConfigError(DamError):
    """Everything that is wrong with a configuration, reported together."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{head} in the dam configuration:\n{lines}")

    def inside(self, place: str) -> "ConfigError":
        """The same problems, each with its place."""
        return ConfigError(*(f"{place}: {problem}" for problem in self.problems))


class CalibrationError(DamError):
    """Calibration text that is missing, unreadable, too short or of another vocabulary."""


class ArchitectureError(DamError):
    """A model whose forward pass cannot be cut into blocks, or whose parts do not fit."""


@contextmanager
def inside(place: str) -> Iterator[None]:
    """Have errors of the body say where they came up: a model, a block, a tensor."""
    try:
        yield
    except DamError as error:
        raise error.inside(place) from error


def first_line(error: BaseException) -> str:
    """What another library says went wrong, without the advice that it adds."""
    return str(error).strip().split("\n", 1)[0]


def listed(names: Sequence[object], most: int = 3) -> str:
    """Some names for a message: the first of them, and whether there are others."""
    return ", ".join(map(str, names[:most])) + (" and others" if len(names) > most else "")
