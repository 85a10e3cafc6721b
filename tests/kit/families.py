"""A base and three fine-tunes of three layers, and merges of their slices.

All differ in every tensor. `stack` makes the expected model of a merge of slices by hand, from the
tensors of the sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.kit.merging import SMALL, tensors_of
from tests.kit.models import Models

LAYERS = 3


@dataclass(frozen=True)
class Family:
    """A base and three fine-tunes, with text for each."""

    models: Models
    texts: tuple[Path, ...]

    def __getitem__(self, index: int) -> Path:
        return self.models.models[index]


Range = tuple[int, int]


def sliced(
    family: Family, *slices: Mapping[int | str, Range], base: bool = False, **parameters: Any
) -> dict[str, Any]:
    """A dam merge of slices: for each, the layers of models by number (or of the "base")."""
    entries = []
    for layers in slices:
        sources: list[dict[str, Any]] = []
        for index, ends in layers.items():
            path = family.models.base if isinstance(index, str) else family[index]
            source: dict[str, Any] = {"model": str(path), "layer_range": list(ends)}
            if not isinstance(index, str):
                source["parameters"] = {"calibration": str(family.texts[index])}
            sources.append(source)
        entries.append({"sources": sources})
    return {
        "merge_method": "dam",
        **({"base_model": str(family.models.base)} if base else {}),
        "slices": entries,
        "parameters": {k: v for k, v in {**SMALL, **parameters}.items() if v is not None},
    }


def stack(family: Family, *layers: tuple[int, int], ends: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of a model made of (model, layer) pairs, with the ends of two models."""
    first, last = (tensors_of(family[index]) for index in ends)
    made = {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}
    for number, (index, layer) in enumerate(layers):
        own = f"model.layers.{layer}."
        for name, tensor in tensors_of(family[index]).items():
            if name.startswith(own):
                made[f"model.layers.{number}.{name.removeprefix(own)}"] = tensor
    return made | {name: last[name] for name in ("model.norm.weight", "lm_head.weight")}
