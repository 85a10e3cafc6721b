"""Freed memory given back to the system."""

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None


def give_back() -> None:
    """Return what has been freed to the system, where the C library would keep it.

    glibc keeps freed pieces for later, and a later stage finds none of them of its size: the
    process grows with every block, though nothing in it does.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
