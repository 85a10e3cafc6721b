"""Ctrl-C and SIGTERM: what ends a merge, and what ends a part of it alone."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def terminable() -> Iterator[Callable[[], None]]:
    """Make SIGTERM end the process as ctrl-c does, so that all clean-up code runs.

    torchrun sends SIGTERM to the processes of a merge when one of them has stopped.

    Yields:
        A function that makes the process ignore SIGTERM from then on.
    """
    stock = signal.getsignal(signal.SIGTERM)
    if not _in_main_thread() or stock != signal.SIG_DFL:
        yield lambda: None
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield _ignore
    finally:
        signal.signal(signal.SIGTERM, stock)


@contextmanager
def first_one_asks(answer: str) -> Iterator[Callable[[], bool]]:
    """Make the first ctrl-c or SIGTERM ask for an early end; the next acts as before.

    A program that has handlers of its own keeps them.

    Args:
        answer: what is printed at once when one comes.

    Yields:
        A function that tells whether one came.
    """
    came: list[int] = []
    stock = {
        number: handler
        for number, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, _exit),
        )
        if _in_main_thread() and signal.getsignal(number) == handler
    }

    def restore() -> None:
        for number, handler in stock.items():
            signal.signal(number, handler)

    def ask(number: int, _: Any) -> None:
        restore()
        came.append(number)
        # Not by print: a handler may come in the middle of another one.
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
    _ignore()
    raise SystemExit(128 + number)


def _ignore() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
