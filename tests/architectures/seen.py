"""Merges of two tiny models of a case by mergekit's `linear` and by `dam`, and their outcome."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from mergekit.architecture import arch_info_for_config
from safetensors.torch import load_file, save_file

from mergekit_dam.errors import DamError
from tests.architectures.case import NO_DECODER, Case
from tests.kit.merging import Merged, dam, linear, merge
from tests.kit.models import Models
from tests.kit.models import save_models as save
from tests.kit.reads import watched_reads


@dataclass(frozen=True)
class Seen:
    """The outcome of the merges of two models of a case.

    Attributes:
        defined: mergekit has a definition of the architecture.
        linear: "works", "loses weights" or "fails": the outcome of mergekit's own `linear`.
        refusal: dam's message, if it refused before any weight was read.
        merged: the model that dam wrote.
    """

    case: Case
    models: Models
    defined: bool
    linear: str
    refusal: str | None = None
    merged: Merged | None = None

    @property
    def row(self) -> str:
        """The README's row."""
        if self.merged is not None:
            averaged = ", ".join(self.case.averaged)
            return f"fitted; averaged: {averaged}" if averaged else "fitted"
        assert self.refusal is not None
        if re.search(NO_DECODER, self.refusal):
            return "refused: no causal decoder"
        if self.linear == "fails":
            return "refused: `linear` fails, too"
        return "refused: blocks hand on, or read, more than hidden states"


def save_case(case: Case, folder: Path) -> Models:
    """A base and two fine-tunes."""
    models = save(folder, case.config(), kind=case.kind)
    if case.stored is None:
        return models
    for path in (models.base, *models.models):
        file = path / "model.safetensors"
        save_file(case.stored(load_file(file)), file, {"format": "pt"})
    return models


def see(case: Case, folder: Path, texts: Sequence[Path]) -> Seen:
    """Merge a case by `linear` and by `dam`."""
    models = save_case(case, folder)
    config = tf.AutoConfig.from_pretrained(models.base)
    seen = Seen(case, models, arch_info_for_config(config) is not None, "fails")
    try:
        found = unfound(merge(linear(models.models), folder / "linear").path, case)
        seen = dataclasses.replace(seen, linear="loses weights" if found else "works")
    except Exception:  # whatever a user would see a traceback of
        pass
    configuration = dam(models.models, texts, base=models.base, samples=8)
    with watched_reads() as reads:
        try:
            return dataclasses.replace(seen, merged=merge(configuration, folder / "out"))
        except DamError as error:
            assert not reads.order
            assert not (folder / "out").exists()
            return dataclasses.replace(seen, refusal=error.message)


def unfound(folder: Path, case: Case) -> dict[str, Any]:
    """Weights that transformers misses, or does not expect, in a saved model."""
    kind: Any = tf.AutoModelForCausalLM if case.kind is None else case.kind
    _, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    return {what: names for what, names in info.items() if names}


def merged_of(seen: Seen) -> Merged:
    assert seen.merged is not None, seen.refusal
    return seen.merged
