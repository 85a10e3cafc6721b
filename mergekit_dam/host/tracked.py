"""The tracking of a merge, if its configuration asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_dam.host.output import kept_beside
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.host.report import versions
from mergekit_dam.lock.folder import TRACKED
from mergekit_dam.parameters import UNRECORDED
from mergekit_dam.reports.names import short_names
from mergekit_dam.streams import distributed
from mergekit_dam.tracking.choose import tracking


@contextmanager
def tracked(prepared: Prepared, tree: Any, folder: Path, *, quiet: bool) -> Iterator[None]:
    """Track a merge in the first process while the body runs.

    Files of the tracking are with what is kept for the next run, so that they stay if that
    continues, and go with the merged model when it is whole.

    Args:
        prepared: the preparation.
        tree: the configuration as it was written, as plain values.
        folder: folder of the merged model, in its workplace.
        quiet: whether nothing is printed.
    """
    run, names = prepared.run, prepared.names
    if run.tracking == "none" or not distributed.is_first():
        yield
        return
    short = short_names([names.of(model) for model in prepared.calibration])
    place = kept_beside(folder) / TRACKED
    configuration = {
        "configuration": names.tree(tree),
        "parameters": names.tree(run.model_dump(mode="json", exclude=set(UNRECORDED))),
        "versions": versions(),
    }
    with tracking(run.tracking, configuration, list(short.values()), place=place, quiet=quiet):
        yield
    if place.is_dir():
        place.rename(folder / TRACKED)
