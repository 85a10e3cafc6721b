"""One line of progress on mergekit's own progress bar."""

import logging

from tqdm import tqdm

LOG = logging.getLogger(__name__)


def show(text: str) -> None:
    """Show a line after the bar of mergekit's executor; without a bar (`--quiet`), show nothing.

    mergekit gives no access to its bar, but tqdm keeps a list of live bars.
    """
    LOG.debug(text)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.set_postfix_str(text)
