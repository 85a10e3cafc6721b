"""Settings of a merge, with everything off but for what a test changes."""

from typing import Any

from mergekit_dam.parameters import LogitsSettings, Objective, RunSettings

PLAIN: dict[str, Any] = {
    "nonlinearity": "none",
    "optimizer": "adamw",
    "mofo_fraction": 0.3,
    "learning_rate": 1e-2,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "steps": 10,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "max_grad_norm": 0.0,
}


def logits_settings(**changes: Any) -> LogitsSettings:
    """Settings with everything off, but for what is changed."""
    return LogitsSettings(**{**PLAIN, **changes})


def run_settings(
    holdout: float = 0.25, objective: Objective = "layer", **logits: Any
) -> RunSettings:
    """Settings of a whole merge."""
    return RunSettings(
        holdout=holdout,
        objective=objective,
        metric="identity",
        logits=logits_settings(**logits),
        start="average",
        resident="auto",
        stream_offload="auto",
        gpu_memory=None,
        forward_dtype="auto",
        seed=0,
    )
