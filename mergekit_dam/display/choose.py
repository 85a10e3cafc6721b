"""The display of a merge, by where it runs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from mergekit_dam.display.course import Course
from mergekit_dam.display.live import OnTerminal
from mergekit_dam.display.plain import Plain
from mergekit_dam.display.status import Status
from mergekit_dam.streams import progress


@contextmanager
def displayed(*, quiet: bool) -> Iterator[None]:
    """Show what a merge does on stderr while the body runs.

    Args:
        quiet: whether nothing is shown.
    """
    if quiet:
        yield
        return
    status = Status(Course(time.perf_counter))
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        with progress.shown_on(Plain(lambda: sys.stderr, status)):
            yield
        return
    live = OnTerminal(console, status)
    with live.open(), progress.shown_on(live):
        yield
