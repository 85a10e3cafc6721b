"""One line of progress on mergekit's own bar."""

import logging

from tqdm import tqdm

LOG = logging.getLogger(__name__)


def show(text: str) -> None:
    """Show a line behind the executor's bar; where there is none (`--quiet`), nothing.

    mergekit hands its bar to nobody, but tqdm keeps count of the bars that are alive.
    """
    LOG.debug(text)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.set_postfix_str(text)
