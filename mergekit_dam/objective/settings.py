"""What an end-to-end fit was asked for, resolved and validated: plain frozen data."""

from dataclasses import dataclass
from typing import Literal

Nonlinearity = Literal["none", "tanh", "sigmoid", "relu"]
OptimizerName = Literal["adamw", "mofo"]
Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
"""Transformers' schedules that need no arguments of their own; any of them may warm up."""


@dataclass(frozen=True, kw_only=True)
class LogitsSettings:
    """The objective `logits` and how it is descended.

    Attributes:
        temperature: of both distributions in the KL, and of the entropy.
        similarity, l1, l2, overlap, weighted_overlap: weights of the penalties of a tensor's
            coefficients; 0 = off.
        mse, entropy: weights of the losses next to the KL; 0 = off.
        nonlinearity: from the values that are learned to the coefficients.
        mofo_fraction: of a model's coefficients in a tensor that move in a step of "mofo".
        learning_rate: its peak; None: by the form of the coefficients.
        warmup: fraction of the steps in which the learning rate rises from zero.
        steps: of the optimiser; None: as many as pay.
        batch_size: sequences of every model whose gradient is taken at once.
        gradient_accumulation: batches a step.
        max_grad_norm: norm that the gradient of all coefficients together is cut to; 0 = off.
    """

    temperature: float = 1.0
    similarity: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    overlap: float = 0.0
    weighted_overlap: float = 0.0
    mse: float = 0.0
    entropy: float = 0.0
    nonlinearity: Nonlinearity
    optimizer: OptimizerName
    mofo_fraction: float
    learning_rate: float | None
    lr_schedule: Schedule
    warmup: float
    steps: int | None
    batch_size: int
    gradient_accumulation: int
    max_grad_norm: float
