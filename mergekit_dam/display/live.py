"""A display for a terminal: a few lines that change, and lines above them that stay."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mergekit_dam.display.status import Status, outlook
from mergekit_dam.streams.progress import Phase

PER_SECOND = 2.0
"""How often the lines are drawn again."""


class OnTerminal:
    """Draws what there is to show at the bottom of a terminal, once the first phase has begun.

    Args:
        console: the terminal.
        status: what there is to show.
    """

    def __init__(self, console: Console, status: Status) -> None:
        self._console, self._status, self._urgent = console, status, ""
        self._told = False  # whether what is urgent was drawn
        self._live = Live(
            console=console,
            get_renderable=self.rendered,
            refresh_per_second=PER_SECOND,
            transient=True,
            redirect_stdout=False,
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Draw while the body runs; leave nothing but the lines that stay."""
        handlers = [
            own
            for name in (None, "transformers")
            for own in logging.getLogger(name).handlers
            if isinstance(own, logging.StreamHandler) and own.stream is sys.stderr
        ]
        self._handlers, stock = handlers, sys.stderr
        try:
            yield
        finally:
            self._live.stop()
            for handler in handlers:
                handler.setStream(stock)

    def plan(self, phases: Sequence[Phase]) -> None:
        """Take note of all phases that may come, and name them."""
        self._status.course.plan(phases)
        self.say(outlook(phases))

    def begin(self, name: str, done: int, steps: int | None) -> None:
        """Begin a phase."""
        if self._status.course.begin(name, done, steps):
            self._status.text = ""
            if self._told:
                self._urgent, self._told = "", False
        if not self._live.is_started:
            self._live.start()
            for handler in self._handlers:  # log lines go above what is drawn
                handler.setStream(sys.stderr)

    def show(self, text: str, step: int | None, share: float) -> None:
        """Show what is under way."""
        self._status.text = text
        self._status.course.at(step, share)

    def advance(self, name: str, text: str) -> None:
        """Show the next step of a phase."""
        step = self._status.course.next_step(name)
        self.begin(name, 0, None)
        self.show(text, step, 0.0)

    def say(self, text: str) -> None:
        """Print a line above what is drawn."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def urge(self, text: str) -> bool:
        """Show a line with the next drawing; a handler must not draw by itself."""
        self._urgent = text
        return self._live.is_started

    def rendered(self) -> RenderableType:
        """The lines as they are now, none longer than the terminal is wide."""
        own, course = self._status, self._status.course
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1, min_width=8)
        bar.add_column(no_wrap=True, overflow="ellipsis")
        bar.add_row(ProgressBar(total=1.0, completed=course.fraction), own.times)
        lines: list[RenderableType] = [_line(own.place, "bold"), bar, _line(own.text)]
        lines.append(_line(own.use, "dim"))
        if self._urgent:
            lines.append(Text(self._urgent, "bold"))
            self._told = True
        return Group(*lines)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")
