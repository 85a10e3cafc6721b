"""All sizes and learning rates of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Shape of the demo's Llama models."""

    vocab_size: int = 1024
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 2
    heads: int = 6
    key_value_heads: int = 3


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One training run.

    Attributes:
        steps: Optimiser steps; the learning rates rise over the first tenth and then fall.
        batch_size: Sequences per step.
        matrix_rate: Learning rate of the matrices inside the blocks.
        other_rate: Learning rate of embeddings, head and norms.
        matrices_by_muon: True: Muon for these matrices, which needs a third of the steps for a
            model from scratch. False: AdamW, which moves less and keeps specialists similar.
        final_rate: Final learning rates, as a fraction of the peak.
    """

    steps: int
    matrix_rate: float
    other_rate: float
    matrices_by_muon: bool
    batch_size: int = 4
    final_rate: float = 0.1

    @property
    def sequences(self) -> int:
        """Number of sequences that the run reads."""
        return self.steps * self.batch_size


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of the whole demo.

    Attributes:
        seed: Seed of text, order and weights.
        train_characters: Characters of training text per domain.
        english_characters: Characters of general text.
        held_out_characters: Characters of calibration text per domain, and of test text.
        sequence_length: Tokens per sequence.
        calibration_samples: Calibration sequences per model for the fit of `dam`.
        test_sequences: Largest number of test sequences per domain.
        domain_share: Share of each domain in the base's training text; the rest is general text,
            so that specialists have something to add.
        model: Shape of the models.
        pretraining: Training of the base.
        finetuning: Training of each specialist, by AdamW in few steps: specialists that differ
            more have a useless average.
    """

    seed: int = 0
    train_characters: int = 250_000
    english_characters: int = 450_000
    held_out_characters: int = 30_000
    sequence_length: int = 256
    calibration_samples: int = 32
    test_sequences: int = 24
    domain_share: float = 0.1
    model: ModelSettings = ModelSettings()
    pretraining: TrainingSettings = TrainingSettings(
        steps=120, matrix_rate=0.02, other_rate=0.01, matrices_by_muon=True
    )
    finetuning: TrainingSettings = TrainingSettings(
        steps=30, matrix_rate=1e-3, other_rate=1e-3, matrices_by_muon=False, final_rate=0.0
    )
