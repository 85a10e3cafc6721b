"""Errors of mergekit's while it runs a dam merge: said as one of ours, without its traceback."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click

from mergekit_dam.errors import DamError, first_line

LOG = logging.getLogger(__name__)


@contextmanager
def mergekit_errors() -> Iterator[None]:
    """Turn errors that mergekit raises in the body into a `DamError`.

    Errors of this package's own code keep their traceback: they are faults to be reported.
    """
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        if not _raised_by_mergekit(error):
            raise
        LOG.debug("mergekit failed here:", exc_info=error)
        raise DamError(
            f"mergekit cannot make this merge ({type(error).__name__}: {first_line(error)}); with "
            f"`-vv` the log says where it failed"
        ) from error


def _raised_by_mergekit(error: BaseException) -> bool:
    """Whether the innermost call of mergekit or of this package was one of mergekit's."""
    innermost, trace = "", error.__traceback__
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in ("mergekit", "mergekit_dam"):
            innermost = package
        trace = trace.tb_next
    return innermost == "mergekit"
