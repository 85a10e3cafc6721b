"""A calibration set and where every token of it comes from."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a calibration set comes from. `dataclasses.asdict` of it is JSON-able.

    source: what the user wrote. files: local files read, in order of reading. dataset,
    revision, split: of a Hub dataset; the revision is a commit where the Hub told it.
    documents_read: non-empty documents read; documents_used: those with a token in the
    set. tokens_available: tokens made before there were enough, all there are if the set
    used up its source; tokens_used = sequences * sequence_length. cut: sentences that say
    what was left out, and why. sha256: of the model's own ids as little-endian int64, row by
    row.
    """

    model: str
    source: str
    files: tuple[str, ...]
    dataset: str | None
    revision: str | None
    split: str | None
    seed: int
    documents_read: int
    documents_used: int
    empty_skipped: int
    tokens_available: int
    tokens_used: int
    sequences: int
    sequence_length: int
    cut: tuple[str, ...]
    sha256: str

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"calibration of {self.model}: {self.sequences} sequences of {self.sequence_length} "
            f"tokens from {self.documents_used:,} of {self.documents_read:,} documents read in "
            f"{self.source} (sha256 {self.sha256[:12]})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """One model's calibration data.

    tokens: int64 [sequences, sequence_length], on the CPU, every position a real token;
    borrowed by whoever reads it, not to be changed. Ids of the model; of the merged model, once
    they are brought into a vocabulary of its own.
    """

    tokens: torch.Tensor
    provenance: Provenance


def tokens_sha256(tokens: torch.Tensor) -> str:
    """Hex sha256 of an int64 tensor's values as little-endian bytes, on any machine."""
    return hashlib.sha256(tokens.contiguous().cpu().numpy().astype("<i8").tobytes()).hexdigest()
