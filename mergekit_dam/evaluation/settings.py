"""How models are evaluated."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How models are evaluated.

    Attributes:
        sequence_length: Tokens per sequence; the first one is not predicted.
        sequences: Largest number of sequences per text; a shorter text is used as a whole.
        batch_size: Sequences per forward pass.
        device: Device on which the models run, such as `cpu` or `cuda:0`.
        dtype: Dtype of weights and products: `float32`, `bfloat16`, `float16`, or `auto` for the
            dtype in which the weights are stored. The residual stream is fp32.
        trust_remote_code: Whether code that comes with a model may run.
    """

    sequence_length: int = 256
    sequences: int = 24
    batch_size: int = 4
    device: str = "cpu"
    dtype: str = "float32"
    trust_remote_code: bool = False
