"""Progress: a line on mergekit's own progress bar, and lines that stay above it."""

import logging
import sys
from typing import Any

from tqdm import tqdm

LOG = logging.getLogger(__name__)


def show(text: str) -> None:
    """Show a line after the bar of mergekit's executor; without a bar (`--quiet`), show nothing."""
    LOG.debug(text)
    for bar in _bars():
        bar.set_postfix_str(text)


def say(text: str) -> None:
    """Say something that stays on the screen: in the log, or else above mergekit's bar."""
    LOG.info(text)
    if not LOG.isEnabledFor(logging.INFO) and _bars():
        tqdm.write(text, file=sys.stderr)


def _bars() -> list[Any]:
    """Live bars: mergekit gives no access to its own, but tqdm keeps a list."""
    return list(getattr(tqdm, "_instances", ()))
