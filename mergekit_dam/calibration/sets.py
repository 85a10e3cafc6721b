"""A calibration set, and the origin of its tokens."""

import hashlib
from dataclasses import dataclass

import torch

KEPT = "dam_calibration."
"""How the names of files begin that keep what models wrote."""


@dataclass(frozen=True, slots=True)
class WrittenDocument:
    """A document that a model wrote.

    Attributes:
        input_ids: The model's own ids; with them the calibration set can be made again.
        text: The same as text, to be read.
    """

    input_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """The origin of a calibration set. `dataclasses.asdict` of it can be written as JSON.

    Attributes:
        source: The value of `calibration:` as the user wrote it.
        files: Local files that were read, in the order of reading.
        dataset: Id of the Hub dataset, or None; of several sources, `parts` has them.
        revision: Its revision; a commit if the Hub answered.
        read_as: What its rows were recognised as, and how many there were.
        documents_read: Number of non-empty documents that were read.
        documents_used: Number of those with a token in the set.
        tokens_available: Tokens made until there were enough, or all tokens of the source.
        tokens_used: `sequences * sequence_length`.
        cut: Sentences that say what was left out or replaced, and why.
        warnings: Sentences that say what speaks against the text, and what to do.
        sentences: Digests of its sentences (see `overlap`), in hexadecimal.
        sha256: Digest of the model's own ids as little-endian int64, row by row.
        synthetic: Whether a model wrote text of it, now or in an earlier merge.
        parts: The origins of the sets that this one is made of, if there are several sources.
    """

    model: str
    source: str
    files: tuple[str, ...]
    dataset: str | None
    revision: str | None
    split: str | None
    seed: int
    read_as: str
    documents_read: int
    documents_used: int
    empty_skipped: int
    tokens_available: int
    tokens_used: int
    sequences: int
    sequence_length: int
    cut: tuple[str, ...]
    sha256: str
    warnings: tuple[str, ...] = ()
    sentences: str = ""
    synthetic: bool = False
    parts: tuple["Provenance", ...] = ()

    def summary(self) -> str:
        """The main facts in one line, for the log."""
        text = " (synthetic: a model wrote it)" if self.synthetic else ""
        return (
            f"calibration of {self.model}: read as {self.read_as}; {self.sequences} sequences of "
            f"{self.sequence_length} tokens from {self.documents_used:,} of "
            f"{self.documents_read:,} documents read in {self.source}{text} "
            f"(sha256 {self.sha256[:12]})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """One model's calibration data.

    Attributes:
        tokens: int64 `[sequences, sequence_length]` on the CPU, without padding; not to be changed
            by readers. They are the model's ids, or the merged model's ids after a translation
            into a vocabulary of its own.
        provenance: The origin of the tokens.
        written: The documents, if the model wrote them for this merge.
    """

    tokens: torch.Tensor
    provenance: Provenance
    written: tuple[WrittenDocument, ...] = ()


def tokens_sha256(tokens: torch.Tensor) -> str:
    """Hex sha256 of an int64 tensor's values as little-endian bytes; the same on any machine."""
    return hashlib.sha256(tokens.contiguous().cpu().numpy().astype("<i8").tobytes()).hexdigest()
