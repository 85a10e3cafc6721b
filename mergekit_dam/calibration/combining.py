"""The calibration sets of several sources -> one set."""

from collections.abc import Sequence

import torch

from mergekit_dam.calibration.overlap import union
from mergekit_dam.calibration.sets import CalibrationSet, Provenance, tokens_sha256


def combined(sets: Sequence[CalibrationSet]) -> CalibrationSet:
    """One set of the sequences of several, in which each is spread over the whole.

    The last sequences judge a fit; so they are of all sources.
    """
    places = [
        ((number + 0.5) / len(own.tokens), place, number)
        for place, own in enumerate(sets)
        for number in range(len(own.tokens))
    ]
    order = [(place, number) for _, place, number in sorted(places)]
    tokens = torch.stack([sets[place].tokens[number] for place, number in order])
    counted: torch.Tensor | None = None
    if any(own.counted is not None for own in sets):
        every = [torch.ones_like(s.tokens).bool() if s.counted is None else s.counted for s in sets]
        counted = torch.stack([every[place][number] for place, number in order])
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
        sha256=tokens_sha256(tokens, counted),
        warnings=tuple(said for part in parts for said in part.warnings),
        sentences=union(part.sentences for part in parts),
        synthetic=any(part.synthetic for part in parts),
        tokens_counted=None if counted is None else int(counted.sum()),
        parts=parts,
    )
    written = tuple(document for own in sets for document in own.written)
    return CalibrationSet(tokens, provenance, written, counted)
