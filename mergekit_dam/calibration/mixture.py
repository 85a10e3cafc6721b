"""Several sources of one model: what is wrong with them, and how many sequences each gives."""

import math
from collections.abc import Sequence

from mergekit_dam.calibration.folders import find_files
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.errors import CalibrationError

Calibration = str | tuple[str, ...]
"""The value of `calibration:`, a source or a list of them."""


def parse_sources(value: Calibration) -> tuple[CalibrationSource, ...]:
    """Parse the value of `calibration:`.

    Raises:
        CalibrationError: If a source is wrong, or stands there twice.
    """
    texts = [value] if isinstance(value, str) else list(value)
    sources = tuple(CalibrationSource.parse(text) for text in texts)
    if len(sources) == 1 and sources[0].share is not None:
        raise CalibrationError(
            f"{texts[0]!r}: `share` divides the sequences among several sources, but this is the "
            "only one: remove `share`, or write a list"
        )
    for source in sources:
        if texts.count(source.text) > 1:
            raise CalibrationError(f"{source.text!r} is listed twice: list it once")
    return sources


def problems_of(value: Calibration, samples: int) -> list[str]:
    """Everything that is wrong with the value of `calibration:`, before a text is read.

    Args:
        value: The value of `calibration:`.
        samples: The parameter `samples` of the merge.
    """
    problems = []
    for text in dict.fromkeys([value] if isinstance(value, str) else value):
        try:
            source = CalibrationSource.parse(text)
            if source.kind == "directory":
                find_files(source)
        except CalibrationError as error:
            problems.append(error.message)
    if not problems:  # how they go together can be told of sound ones alone
        try:
            divided(parse_sources(value), samples)
        except CalibrationError as error:
            problems.append(error.message)
    return problems


def divided(sources: Sequence[CalibrationSource], samples: int) -> tuple[int, ...]:
    """Number of sequences of each source.

    A source with `samples` gives that many. The others divide `samples` among them: each gives its
    `share`, and those without one give equal parts of the rest.

    Args:
        sources: The sources of one model.
        samples: The parameter `samples` of the merge.

    Raises:
        CalibrationError: If the shares do not add up to 1 (or to less, with sources that have
            none), or if a source would give no sequence.
    """
    shared = [source for source in sources if source.samples is None]
    given = [source.share for source in shared if source.share is not None]
    open_ended = len(shared) - len(given)
    total = math.fsum(given)
    if given and (total > 1 + 1e-9 if open_ended == 0 else total >= 1 - 1e-9):
        raise CalibrationError(
            f"the shares add up to {total:g}, which leaves nothing for others: lower them"
            if open_ended
            else f"the shares add up to {total:g}: let them add up to 1"
        )
    if given and not open_ended and total < 1 - 1e-9:
        raise CalibrationError(
            f"the shares add up to {total:g}: let them add up to 1, or leave one source without"
        )
    rest = (1 - total) / open_ended if open_ended else 0.0
    shares = [rest if source.share is None else source.share for source in shared]
    counts = iter(_rounded([share * samples for share in shares], samples))
    result = tuple(source.samples or next(counts) for source in sources)
    for source, count in zip(sources, result, strict=True):
        if not count:
            raise CalibrationError(
                f"{source.text!r} would give none of {samples} sequences: raise `samples` or its "
                "share, or leave it out"
            )
    return result


def _rounded(amounts: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, by the largest remainders."""
    counts = [math.floor(amount + 1e-9) for amount in amounts]
    by_remainder = sorted(range(len(amounts)), key=lambda i: (counts[i] - amounts[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
