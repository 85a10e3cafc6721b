"""Warnings of libraries about which nobody who merges can do anything."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_OF_NO_USE = ("`torch_dtype` is deprecated",)
"""What such warnings say: mergekit and not its user calls transformers so."""


class _Useful(logging.Filter):
    """Lets through all messages but these."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _OF_NO_USE)


@contextmanager
def without_noise() -> Iterator[None]:
    """Leave such warnings out of the log while the body runs."""
    useful = _Useful()
    names = ("transformers.configuration_utils", "transformers.modeling_utils")
    for name in names:
        logging.getLogger(name).addFilter(useful)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(useful)
