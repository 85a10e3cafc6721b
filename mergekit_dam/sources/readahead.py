"""Asks the operating system to read the next stage's weights while this stage is fitted.

mergekit maps weights into memory, so a page is read from the disk at its first access. A thread
tells the system in advance which pages these will be; it holds none of them itself. Where the
system has no such call (macOS, Windows), nothing is read ahead.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """A range of bytes in a file."""

    path: Path
    offset: int
    length: int


_THREAD = ThreadPoolExecutor(1, "dam-read-ahead")


def read_ahead(spans: Iterable[Span]) -> None:
    """Ask the system to read byte ranges of files into its cache, in the background."""
    if hasattr(os, "posix_fadvise"):
        _THREAD.submit(_advise, tuple(spans))


def _advise(spans: tuple[Span, ...]) -> None:
    for span in spans:
        with span.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), span.offset, span.length, os.POSIX_FADV_WILLNEED)
