"""Several sources of one model: how many sequences each gives, and the set of all of them."""

import math
from collections.abc import Sequence

import torch

from mergekit_dam.calibration.overlap import union
from mergekit_dam.calibration.sets import CalibrationSet, Provenance, tokens_sha256
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


def combined(sets: Sequence[CalibrationSet]) -> CalibrationSet:
    """One set of the sequences of several, in which each is spread over the whole.

    The last sequences judge a fit; so they are of all sources.
    """
    rows = [
        ((number + 0.5) / len(own.tokens), place, own.tokens[number])
        for place, own in enumerate(sets)
        for number in range(len(own.tokens))
    ]
    tokens = torch.stack([row for _, _, row in sorted(rows, key=lambda row: row[:2])])
    parts = tuple(own.provenance for own in sets)
    first = parts[0]
    provenance = Provenance(
        model=first.model,
        source=", ".join(part.source for part in parts),
        files=tuple(file for part in parts for file in part.files),
        dataset=None,
        revision=None,
        split=None,
        seed=first.seed,
        read_as="; ".join(part.read_as for part in parts),
        documents_read=sum(part.documents_read for part in parts),
        documents_used=sum(part.documents_used for part in parts),
        empty_skipped=sum(part.empty_skipped for part in parts),
        tokens_available=sum(part.tokens_available for part in parts),
        tokens_used=tokens.numel(),
        sequences=len(tokens),
        sequence_length=first.sequence_length,
        cut=tuple(f"{part.source}: {sentence}" for part in parts for sentence in part.cut),
        sha256=tokens_sha256(tokens),
        warnings=tuple(said for part in parts for said in part.warnings),
        sentences=union(part.sentences for part in parts),
        synthetic=any(part.synthetic for part in parts),
        parts=parts,
    )
    written = tuple(document for own in sets for document in own.written)
    return CalibrationSet(tokens, provenance, written)
