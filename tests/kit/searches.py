"""Searches that take a second or two."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.journal import Journal
from mergekit_dam.search.search import search
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import Models
from tests.kit.networks import Made
from tests.kit.settings import run_settings

SAMPLES, HELD_OUT = 12, 4
POLISH: dict[str, Any] = {
    "objective": "layer+logits",
    "samples": SAMPLES,
    "holdout": HELD_OUT / SAMPLES,
    "sequence_length": 16,
    "steps": 3,
    "batch_size": 4,
    "learning_rate": 5e-3,
}
"""A search that takes a second or two."""
DESCENT = ("steps", "batch_size", "learning_rate")


def polished(
    models: Models,
    calibration: Sequence[Path],
    out: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    base: bool = True,
    **more: Any,
) -> Merged:
    settings = {**POLISH, **(changes or {}), **more}
    if settings["objective"] == "layer":
        settings = {name: settings[name] for name in settings if name not in DESCENT}
    own = models.base if base else None
    return merge(dam(models.models, calibration, base=own, **settings), out)


def searched(made: Made, scratch: Path, **changes: Any) -> MergeRecord:
    small = {"steps": 2, "batch_size": 4, "learning_rate": 5e-3, "objective": "layer+logits"}
    settings = run_settings(**{**small, **changes})
    journal = Journal(scratch, keeps=False)
    return search(made.network(), made.streams(9, 3), settings, made.average(), journal=journal)
