"""`report`."""

import os
from pathlib import Path

from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.reports.page import remake_page
from mergekit_dam.reports.schema import DamReport, read


def report(
    out: str | os.PathLike[str],
    *,
    html: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
) -> DamReport:
    """The report of a merge as typed data; no weights are read.

    Args:
        out: Folder of a merged model.
        html: Where to write the page, if it is wanted.
        png: Where to write a picture of the coefficients, if it is wanted; needs matplotlib (the
            extra `plot`).

    Returns:
        The report: among others `sources`, `search` (trials with held-out KL in nats per token),
        `tensors` (outcome, losses and spread of coefficients of each).

    Raises:
        DamError: The folder has no report, or a damaged one, or a file cannot be written.

    >>> import mergekit_dam
    >>> found = mergekit_dam.report("merged", html="page.html")
    >>> found.sources
    ('models/math', 'models/animals')
    >>> sorted(found.tensors[0].coefficients) == sorted(found.sources)
    True
    """
    found = read(Path(out) / REPORT_NAME)
    if html is not None:
        remake_page(Path(out), Path(html))
    if png is not None:
        from mergekit_dam.reports.figure import write_figure

        write_figure(found, Path(png))
    return found
