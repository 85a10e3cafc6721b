"""Values that parameters with a choice may have."""

from typing import Literal

Offload = Literal["auto", "device", "host", "disk"]
Nonlinearity = Literal["none", "tanh", "sigmoid", "relu"]
Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
"""Transformers' schedules that need no further arguments; all of them allow a warm-up."""
Granularity = Literal["column", "tensor"]
Objective = Literal["layer", "logits", "layer+logits"]
ExpertFeed = Literal["routed", "all"]
CorrectionKind = Literal["none", "low_rank", "full"]
Resident = Literal["auto", "always", "never"]
Tracking = Literal["none", "tensorboard", "wandb"]
