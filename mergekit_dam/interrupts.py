"""Ctrl-C, SIGTERM and SIGHUP: what ends a merge, and what ends a part of it alone."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_ENDING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows has no SIGHUP, which a closed terminal sends
"""Signals that end a process at once, unless it has a handler for them."""


@contextmanager
def terminable() -> Iterator[Callable[[], None]]:
    """Make SIGTERM and SIGHUP end the process as ctrl-c does, so that all clean-up code runs.

    torchrun sends SIGTERM to the processes of a merge when one of them has stopped. A signal that
    the program handles or ignores (`nohup`) stays so.

    Yields:
        A function that makes the process ignore these signals and ctrl-c from then on.
    """
    free = [
        number
        for number in _ENDING
        if _in_main_thread() and signal.getsignal(number) == signal.SIG_DFL
    ]

    interrupt = signal.getsignal(signal.SIGINT)
    stoppable = _in_main_thread() and interrupt == signal.default_int_handler

    def ignore() -> None:
        for number in (*free, *([signal.SIGINT] if stoppable else [])):
            signal.signal(number, signal.SIG_IGN)

    for number in free:
        signal.signal(number, _exit)
    try:
        yield ignore
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)
        if stoppable:
            signal.signal(signal.SIGINT, interrupt)


@contextmanager
def first_one_asks(
    answer: str, show: Callable[[str], bool] = lambda _: False
) -> Iterator[Callable[[], bool]]:
    """Make the first ctrl-c, SIGTERM or SIGHUP ask for an early end; the next acts as before.

    A program that has handlers of its own keeps them.

    Args:
        answer: what is printed at once when one comes.
        show: shows it elsewhere, without any printing of its own; returns whether it could.

    Yields:
        A function that tells whether one came.
    """
    came: list[int] = []
    stock = {
        number: handler
        for number, handler in (
            (signal.SIGINT, signal.default_int_handler),
            *((number, _exit) for number in _ENDING),
        )
        if _in_main_thread() and signal.getsignal(number) == handler
    }

    def restore() -> None:
        for number, handler in stock.items():
            signal.signal(number, handler)

    def ask(number: int, _: Any) -> None:
        restore()
        came.append(number)
        if show(answer):
            return
        # Not by print: a handler may come in the middle of another one.
        with suppress(OSError):  # the terminal may be closed
            os.write(2, f"\n{answer}\n".encode())

    for number in stock:
        signal.signal(number, ask)
    try:
        yield lambda: bool(came)
    finally:
        restore()


def _in_main_thread() -> bool:
    """Whether this is the thread that may set handlers."""
    return threading.current_thread() is threading.main_thread()


def _exit(number: int, _: Any) -> None:
    for other in _ENDING:
        if signal.getsignal(other) == _exit:
            signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)
