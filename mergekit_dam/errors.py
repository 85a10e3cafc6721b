"""Errors for users; the messages say how to fix the problem."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click


class DamError(click.ClickException):
    """Base of every error that this package raises on purpose.

    It is a click exception: `mergekit-yaml` and `mergekit-dam` print only the message and exit
    with status 1. In Python code it is an ordinary exception whose `str` is the message. A
    message says what was required, where, what was got, and the remedy.
    """

    def inside(self, place: str) -> "DamError":
        """The same error with its place in front, which the code that raised it cannot know."""
        return type(self)(f"{place}: {self.message}")


class ConfigError(DamError):
    """All problems of a configuration, reported together."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{head} in the dam configuration:\n{lines}")

    def inside(self, place: str) -> "ConfigError":
        """The same problems, each with its place in front."""
        return ConfigError(*(f"{place}: {problem}" for problem in self.problems))


class CalibrationError(DamError):
    """Calibration text that is missing, unreadable, too short or of another vocabulary."""


class CheckpointError(DamError):
    """Files of a model that are missing or damaged, or weights that are not finite."""


class ArchitectureError(DamError):
    """A model whose forward pass cannot be cut into blocks, or whose parts do not fit."""


@contextmanager
def inside(place: str) -> Iterator[None]:
    """Put the place (a model, a block, a tensor) in front of errors that the body raises."""
    try:
        yield
    except DamError as error:
        raise error.inside(place) from error


def first_line(error: BaseException) -> str:
    """First line of another library's error, without the advice that follows it."""
    return str(error).strip().split("\n", 1)[0]


def listed(names: Sequence[object], most: int = 3) -> str:
    """The first `most` names for a message, and whether there are others."""
    return ", ".join(map(str, names[:most])) + (" and others" if len(names) > most else "")
