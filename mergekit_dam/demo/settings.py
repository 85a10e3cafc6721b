"""Every size and rate of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Shape of the demo's Llama models."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 3


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One training run.

    Attributes:
        steps: optimizer steps; the rates rise over the first tenth of them and then fall.
        batch_size: sequences per step.
        matrix_rate: learning rate of the matrices inside the blocks.
        other_rate: learning rate of embeddings, head and norms.
        matrices_by_muon: Muon for those matrices, which learns a model from nothing in a
            third of the steps; else AdamW, which moves less and keeps specialists related.
        final_rate: what is left of the rates at the end, as a fraction.
    """

    steps: int
    matrix_rate: float
    other_rate: float
    matrices_by_muon: bool
    batch_size: int = 4
    final_rate: float = 0.1

    @property
    def sequences(self) -> int:
        """How many sequences the run reads."""
        return self.steps * self.batch_size


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The whole demo.

    Attributes:
        seed: of text, order, weights.
        train_characters: training text per domain.
        english_characters: general text.
        held_out_characters: calibration text, and as much test text, per domain.
        calibration_samples: sequences per model that the fit of `dam` gets.
        test_sequences: sequences per domain that losses are measured on, at most.
        domain_share: share of each domain in what the base is trained on; the rest is general
            text, so that specialists have something to add.
        pretraining: of the base.
        finetuning: of each specialist; AdamW and few steps, or the average is hopeless.
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
        steps=200, matrix_rate=0.02, other_rate=0.01, matrices_by_muon=True
    )
    finetuning: TrainingSettings = TrainingSettings(
        steps=60, matrix_rate=1e-3, other_rate=1e-3, matrices_by_muon=False, final_rate=0.0
    )
