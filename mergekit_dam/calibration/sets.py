"""A calibration set, and the origin of its tokens."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

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
        tokens_counted: Number of tokens that count in losses; None if all do.
        sha256: Digest of the model's own ids as little-endian int64, row by row, and of which
            tokens count, a byte each, if not all do.
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
    tokens_counted: int | None = None
    parts: tuple["Provenance", ...] = ()

    def told(self) -> dict[str, Any]:
        """All of it as plain values, for the report; without what only some texts have."""

        def known(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: v for k, v in pairs if k != "tokens_counted" or v is not None}

        return dataclasses.asdict(self, dict_factory=known)

    def summary(self) -> str:
        """The main facts in one line, for the log."""
        text = " (synthetic: a model wrote it)" if self.synthetic else ""
        counted = self.tokens_counted
        if counted is not None:
            text += f"; {counted:,} of {self.tokens_used:,} tokens count, those of the assistant"
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
        counted: Which tokens count in losses, bool, in the shape of `tokens`: those whose next
            token is one that a user asked to be judged by. None if all do.
        written: The documents, if the model wrote them for this merge.
    """

    tokens: torch.Tensor
    provenance: Provenance
    written: tuple[WrittenDocument, ...] = ()
    counted: torch.Tensor | None = None

    def number_counted(self, held_out: int) -> int:
        """Number of tokens that count in the last sequences, `held_out` of them."""
        counted = self.counted
        if counted is None:
            return held_out * self.tokens.shape[1]
        return int(counted[len(counted) - held_out :].sum())


def tokens_sha256(tokens: torch.Tensor, counted: torch.Tensor | None = None) -> str:
    """Hex sha256 of token ids, and of which of them count; the same on any machine.

    Args:
        tokens: int64, which is read as little-endian bytes.
        counted: bool, which is read as a byte each; None adds nothing.
    """
    digest = hashlib.sha256(tokens.contiguous().cpu().numpy().astype("<i8").tobytes())
    if counted is not None:
        digest.update(counted.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
