"""The ways to fit, for tests that run all of them: parameters by name."""

from typing import Any

SIZES: dict[str, Any] = {"samples": 8, "sequence_length": 32}

FITS: dict[str, dict[str, Any]] = {
    "columns": {"objective": "layer", "metric": "identity"},
    "low rank": {"objective": "layer", "metric": "identity", "correction": "low_rank"},
    "sensitivity": {"objective": "layer", "metric": "sensitivity"},
    "sensitivity, full": {"objective": "layer", "metric": "sensitivity", "correction": "full"},
    "logits": {"objective": "logits", "steps": 3},
    "default": {
        "objective": "layer+logits",
        "metric": "sensitivity",
        "correction": "low_rank",
        "correction_rank": 8,
        "steps": 3,
    },
}
