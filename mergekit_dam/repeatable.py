"""Results that are the same bytes in every run, on a GPU, too.

Some of torch's operations add up in the order in which threads arrive, unless they are asked not
to. Gradients of attention do (flash and memory-efficient), and they obey torch's strict mode alone,
in which operations that know no other way raise an error.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, ParamSpec, TypeVar

import torch

from mergekit_dam.errors import first_line

LOG = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def repeatable() -> Iterator[None]:
    """Have operations add up in one order while the body runs; torch warns of those that cannot.

    Torch's mode is one for all threads. It ends when the last of several bodies does.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch warns of all products
    with _mode(strict=False):
        yield


def in_one_order(compute: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function with gradients inside, which add up in one order.

    Where an operation knows no such order, the function runs once more in the mode that was set,
    and a warning says so.

    Args:
        compute: runs a model forwards and backwards; a second call must give the same.
    """
    try:
        with _mode(strict=True):
            return compute(*args, **kwargs)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        _warn(first_line(error))
    return compute(*args, **kwargs)


@functools.cache
def _warn(reason: str) -> None:
    LOG.warning("two runs of this merge may differ in their last bits: %s", reason)


class _Running:
    """How many bodies run in a mode, strict (True) or not, and what to set when none does."""

    lock = threading.Lock()
    bodies: ClassVar = {True: 0, False: 0}
    before: tuple[bool, bool, bool] = (False, False, True)


@contextmanager
def _mode(*, strict: bool) -> Iterator[None]:
    """Torch's mode of one order, which warns, or is strict while any body asks for it."""
    with _Running.lock:
        if not any(_Running.bodies.values()):
            _Running.before = (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            )
        _Running.bodies[strict] += 1
        _set()
    try:
        yield
    finally:
        with _Running.lock:
            _Running.bodies[strict] -= 1
            _set()


def _set() -> None:
    enabled, warn_only, filled = _Running.before
    if any(_Running.bodies.values()):
        enabled, warn_only, filled = True, not _Running.bodies[True], False
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
