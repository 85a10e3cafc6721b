"""Asks the system for the weights of the next stage while this one is fitted.

mergekit maps weights into memory, so that a page is read from the disk when it is first touched.
A thread tells the system beforehand which pages those will be; it holds none of them itself.
Where the system takes no such advice (macOS, Windows), nothing is read ahead.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    path: Path
    offset: int
    length: int


_THREAD = ThreadPoolExecutor(1, "dam-read-ahead")


def read_ahead(spans: Iterable[Span]) -> None:
    """Have the system read bytes of files into its cache, in the background."""
    if hasattr(os, "posix_fadvise"):
        _THREAD.submit(_advise, tuple(spans))


def _advise(spans: tuple[Span, ...]) -> None:
    for span in spans:
        with span.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), span.offset, span.length, os.POSIX_FADV_WILLNEED)
