"""Merges run in this process, by mergekit's own entry point, and the files that they write.

merged = merge(dam(models.models, calibration, base=models.base), tmp_path / "out")
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_dam.coefficients.file import FILE_NAME, CoefficientFile
from mergekit_dam.errors import DamError
from tests.kit.reads import watched_reads
from tests.kit.texts import Calibration

SMALL: dict[str, Any] = {
    "samples": 4,
    "sequence_length": 16,
    "objective": "layer",
    "metric": "identity",
    "correction": "none",
}
"""Parameters of a merge that takes a second, of coefficients alone."""

SAMPLES, HELD_OUT = 6, 2
"""Sequences of each model, and those of them that are held out, in the merge of the session."""


@dataclass(frozen=True)
class Merged:
    """The folder that a merge wrote."""

    path: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.path / "dam_report.json").read_text("utf-8"))
        return report

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The report's entries by name of the tensor."""
        return {entry["name"]: entry for entry in self.report["tensors"]}

    @cached_property
    def coefficients(self) -> CoefficientFile:
        return CoefficientFile.load(self.path)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.path)

    @property
    def model_bytes(self) -> bytes:
        return (self.path / "model.safetensors").read_bytes()

    @property
    def coefficient_bytes(self) -> bytes:
        return (self.path / FILE_NAME).read_bytes()

    def load(self) -> PreTrainedModel:
        """The merged model; raises AssertionError unless every weight of it was found."""
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.path, output_loading_info=True, dtype=torch.float32
        )
        model, info = loaded
        assert not any(info.values()), info
        return cast(PreTrainedModel, model)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model of one shard, or of a file with coefficients."""
    return load_file(folder / "model.safetensors")


def dam(
    models: Sequence[Path],
    calibration: Sequence[Path | str | None] = (),
    /,
    *,
    base: Path | None = None,
    each: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """A configuration with the method dam, of a `SMALL` merge.

    The objective `logits` alone has no metric: it takes that of `SMALL` away.

    Args:
        calibration: text of each model, or None.
        each: further parameters of each model.
        settings: further keys of the configuration, such as `dtype`.
        parameters: parameters of the merge.
    """
    entries = []
    for index, model in enumerate(models):
        own = dict(each[index]) if index < len(each) else {}
        if index < len(calibration) and calibration[index] is not None:
            own["calibration"] = str(calibration[index])
        entries.append({"model": str(model), **({"parameters": own} if own else {})})
    small = dict(SMALL)
    if parameters.get("objective") == "logits":
        del small["metric"]
    return {
        "merge_method": "dam",
        **({"base_model": str(base)} if base is not None else {}),
        "models": entries,
        "parameters": {**small, **parameters},
        **(settings or {}),
    }


def linear(
    models: Sequence[Path], weights: Sequence[float] = (), **settings: Any
) -> dict[str, Any]:
    """A configuration with mergekit's own method linear."""
    weights = weights or [1.0] * len(models)
    entries = [
        {"model": str(model), "parameters": {"weight": weight}}
        for model, weight in zip(models, weights, strict=True)
    ]
    return {"merge_method": "linear", "models": entries, **settings}


def merge(configuration: Mapping[str, Any], out: Path, **options: Any) -> Merged:
    """Run a merge in this process, as a program that imports mergekit would."""
    LoaderCache.loaders.clear()  # for the whole process; it would keep files that are gone
    run_merge(
        MergeConfiguration.model_validate(configuration),
        str(out),
        MergeOptions(**{"quiet": True, **options}),
    )
    return Merged(out)


def refused(configuration: dict[str, Any], out: Path, *messages: str) -> None:
    """Assert that a merge is refused with messages, before any weight is read."""
    with watched_reads() as reads, pytest.raises(DamError) as error:
        merge(configuration, out)
    for message in messages:
        assert message in str(error.value)
    assert reads.order == []
    assert not out.exists()


one_sweep_and_a_search = pytest.mark.parametrize(
    "own",
    [
        {"objective": "layer", "metric": "identity"},
        {"objective": "layer+logits", "metric": "sensitivity", "steps": 2},
    ],
    ids=str,
)


def rows(merged: Merged, name: str) -> Tensor:
    return merged.coefficients.coefficients[name]


def mean(merged: Merged, name: str, source: int) -> float:
    return rows(merged, name)[source].mean().item()


def sliced_dam(
    models: Sequence[Path],
    calibration: Calibration,
    ranges: Sequence[tuple[int, int]],
    *,
    weights: Sequence[float] = (1.0, 1.0),
    **parameters: Any,
) -> dict[str, Any]:
    """A merge of slices with the same layers of every model."""
    configuration = dam(models, head=False, **parameters)
    del configuration["models"]
    own = [
        {"calibration": str(text), "weight": weight}
        for text, weight in zip(calibration, weights, strict=True)
    ]
    configuration["slices"] = [
        {
            "sources": [
                {"model": str(model), "layer_range": list(layers), "parameters": parameters}
                for model, parameters in zip(models, own, strict=True)
            ]
        }
        for layers in ranges
    ]
    return configuration
