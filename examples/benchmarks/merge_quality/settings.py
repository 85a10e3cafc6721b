"""Sizes and places of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from examples.benchmarks.measuring.models import Models
from examples.benchmarks.measuring.processes import Runner
from examples.benchmarks.merge_quality.documents import Shares
from mergekit_dam.evaluation.settings import EvaluationSettings

JUDGED = ("validation", "test")
"""The parts of the text that losses are measured on."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and places of a run.

    Attributes:
        out: folder of everything that is written.
        shares: how a file that serves for several parts is divided.
        samples: calibration sequences per model.
        sequence_length: tokens per sequence, in calibration and in evaluation.
        sequences: most sequences of validation and of test text, per domain.
        dtype: dtype in which merges are computed and written.
        device: where merges are computed and models are evaluated.
        adapter_cache: folder of merged adapters; one in `out` if None.
        keep: leave the chosen merges in `out`.
    """

    out: Path
    shares: Shares = field(default_factory=Shares)
    samples: int = 16
    sequence_length: int = 256
    sequences: Mapping[str, int] = field(default_factory=lambda: {"validation": 8, "test": 24})
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    adapter_cache: Path | None = None
    keep: bool = False

    @property
    def evaluation(self) -> EvaluationSettings:
        """The settings with which models are evaluated."""
        return EvaluationSettings(sequence_length=self.sequence_length, device=self.device)


@dataclass(frozen=True)
class Bench:
    """The data that every step needs.

    Attributes:
        tokens: validation and test text, by part and domain; int64 `[sequences, sequence_length]`.
        run: runs the command of a merge.
    """

    models: Models
    tokens: Mapping[str, Mapping[str, torch.Tensor]]
    settings: Settings
    run: Runner
