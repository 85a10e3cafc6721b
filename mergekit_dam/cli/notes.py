"""Notes that libraries repeat, said once."""

import logging
import re

_LOGGERS = ("huggingface_hub.utils._http", "huggingface_hub.utils._headers")


class Once(logging.Filter):
    """Lets each kind of message pass once; addresses and numbers in it do not count."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this is the first message of its kind."""
        kind = re.sub(r"https?://\S+|\d+", "", record.getMessage())
        new = kind not in self._said
        self._said.add(kind)
        return new


def quiet_hub() -> None:
    """Have the Hub's client say once that it is out of reach, or that nobody is logged in."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(own, Once) for own in logger.filters):
            logger.addFilter(Once())
