"""Whether text that judges a merge took part in it, told by digests of sentences.

The digests of a set are the smallest of all its sentences' digests, so that those of two texts can
be compared although each keeps few (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900).
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from mergekit_dam.calibration.pieces import Piece
from mergekit_dam.untrusted import parsed_json

LOG = logging.getLogger(__name__)

OVERLAP = 0.1
"""Share of sentences above which there is a warning."""

KEPT = 1024
"""Number of digests that a set keeps."""

_BYTES = 4
_SHORTEST = 32  # characters: shorter sentences stand in many texts
_COMMON = 0.1  # share of the pieces; what stands in more of them is a prompt, or a licence
_FEWEST = 20  # pieces, for that share to mean something
_SENTENCE = re.compile(r"[\n.!?。]+")


class Sentences:
    """Digests of the sentences of a text, collected while its pieces are read."""

    def __init__(self) -> None:
        self._pieces: Counter[int] = Counter()
        self._count = 0

    def of(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The same pieces; their sentences are collected."""
        for piece in pieces:
            content = piece.content.content
            if isinstance(content, str):
                self._count += 1
                self._pieces.update(set(_digests(content)))
            yield piece

    def all(self) -> set[int]:
        """The digests of all sentences."""
        return set(self._pieces)

    def kept(self) -> str:
        """The digests to keep, in hexadecimal, without sentences that many pieces share."""
        most = _COMMON * self._count if self._count >= _FEWEST else self._count
        own = sorted(digest for digest, count in self._pieces.items() if count <= most)
        return _written(own[:KEPT])


def union(kept: Iterable[str]) -> str:
    """What a text of several parts keeps, given what these keep."""
    return _written(sorted({digest for own in kept for digest in _read(own)})[:KEPT])


def shared(kept: str, sentences: Sentences) -> float:
    """Share of the sentences of a text that also stand in another text.

    Args:
        kept: What the other text keeps.
        sentences: The sentences of the text.
    """
    others = _read(kept)
    own = sentences.all()
    if len(others) == KEPT:  # of larger digests nothing is known
        own = {digest for digest in own if digest <= max(others)}
    return len(own & others) / len(own) if own else 0.0


def in_both(kept: str, other: str) -> float:
    """Share of the sentences that one of two texts keeps and the other keeps, too.

    It is of the one that keeps fewer, as far as both keep theirs.
    """
    ours, theirs = _read(kept), _read(other)
    ends = [max(own) for own in (ours, theirs) if len(own) == KEPT]
    if ends:  # of larger digests nothing is known
        ours, theirs = ({d for d in own if d <= min(ends)} for own in (ours, theirs))
    fewer = min(len(ours), len(theirs))
    return len(ours & theirs) / fewer if fewer else 0.0


def _digests(text: str) -> Iterator[int]:
    for sentence in _SENTENCE.split(text):
        folded = " ".join(sentence.split())
        if len(folded) >= _SHORTEST:
            yield int.from_bytes(
                hashlib.sha256(folded.encode("utf-8", "replace")).digest()[:_BYTES], "big"
            )


def _written(digests: Iterable[int]) -> str:
    return "".join(digest.to_bytes(_BYTES, "big").hex() for digest in digests)


def _read(kept: str) -> set[int]:
    content = bytes.fromhex(kept)
    return {
        int.from_bytes(content[start : start + _BYTES], "big")
        for start in range(0, len(content), _BYTES)
    }


def warn_of_overlap(report: Path, text: str, sentences: Sentences) -> None:
    """Warn if a text is calibration text of the merge that wrote a report.

    Args:
        report: Path of the report, which need not exist.
        text: Name of the text, for the warning.
        sentences: The sentences of the text.
    """
    try:
        sets = parsed_json(report.read_bytes())["calibration"]
        shares = {model: shared(str(own["sentences"]), sentences) for model, own in sets.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no merge of this package, or one of an earlier version
    for model, share in shares.items():
        if share > OVERLAP:
            LOG.warning(
                "%s: %.0f %% of its sentences are in the calibration text of %s, with which %s was "
                "merged; that loss is no measure: judge by text that took no part",
                text,
                100 * share,
                model,
                report.parent,
            )
