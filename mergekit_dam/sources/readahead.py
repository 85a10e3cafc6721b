"""Asks the operating system to read the next stage's weights while this stage is fitted.

mergekit maps weights into memory, so a page is read from the disk at its first access. A thread
tells the system in advance which pages these will be; it holds none of them itself. Where the
system has no such call (macOS, Windows), nothing is read ahead.
"""

import contextlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """A range of bytes in a file."""

    path: Path
    offset: int
    length: int


def read_ahead(spans: Iterable[Span]) -> None:
    """Ask the system to read byte ranges of files into its cache, in the background."""
    if hasattr(os, "posix_fadvise"):
        # A daemon, as the end of the process waits for no advice. (It would wait for the thread of
        # an executor, and for ever if ctrl-c came while that thread was started.)
        arguments = (tuple(spans),)
        threading.Thread(target=_advise, args=arguments, name="dam-read-ahead", daemon=True).start()


def _advise(spans: tuple[Span, ...]) -> None:
    for span in spans:
        with contextlib.suppress(OSError), span.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), span.offset, span.length, os.POSIX_FADV_WILLNEED)
