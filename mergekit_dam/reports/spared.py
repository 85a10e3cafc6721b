"""What is shown of a merge may fail without undoing it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOG = logging.getLogger(__name__)


@contextmanager
def merge_spared(failed: str) -> Iterator[None]:
    """Warn where the body fails: the merged model is whole without what it makes.

    Args:
        failed: What has failed and what to do, as a sentence for the log.

    Raises:
        OSError: A file cannot be written, as other files of the merge could not be then.
    """
    try:
        yield
    except OSError:
        raise
    except Exception:
        LOG.warning(failed, exc_info=True)
