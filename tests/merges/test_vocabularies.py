"""Merges of models whose tokenizers differ come nearer to the models."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_dam.coefficients.file import CoefficientFile
from tests.kit.merging import Merged, merge, tensors_of
from tests.kit.models import HEAD, loaded, logits_of
from tests.kit.vocabularies import Pair, ids_of, lines_of, own_columns, save_pair


class TestSlices:
    def sliced(self, pair: Pair, second: slice) -> dict[str, Any]:
        """The merge of layer 0 of both models, and of layer 1 of some of them."""
        configuration = pair.dam()
        models = configuration.pop("models")
        configuration["slices"] = [
            {"sources": [{**entry, "layer_range": [0, 1]} for entry in models]},
            {"sources": [{**entry, "layer_range": [1, 2]} for entry in models[second]]},
        ]
        return configuration

    def test_of_all_layers_are_the_whole_merge(
        self, pair: Pair, union: Merged, tmp_path: Path
    ) -> None:
        merged = merge(self.sliced(pair, slice(None)), tmp_path / "out")
        assert merged.model_bytes == union.model_bytes

    def test_may_leave_a_model_out(self, pair: Pair, tmp_path: Path) -> None:
        merged = merge(self.sliced(pair, slice(1, None)), tmp_path / "out")
        assert merged.load().config.vocab_size == 28
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(merged.tensors[name], tensors_of(pair.models[1])[name])


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "fit",
    [
        {"objective": "layer", "metric": "identity"},
        {"objective": "layer", "metric": "sensitivity"},
        {"objective": "layer+logits", "metric": "sensitivity", "steps": 4, "mse": 0.1},
        {"objective": "logits", "steps": 16},
    ],
    ids=["identity", "sensitivity", "layer+logits", "logits"],
)
def test_every_objective_comes_nearer_to_the_models_and_is_replayed(
    tmp_path: Path, fit: dict[str, Any], architecture: str
) -> None:
    pair = save_pair(tmp_path, architecture)
    merged = merge(pair.dam(samples=8, **fit), tmp_path / "out")
    whole = merged.load()
    assert whole.config.vocab_size == 28
    assert (HEAD in merged.tensors) is (architecture == "llama")
    search = merged.report["search"]
    assert bool(search) is (fit.get("metric") != "identity")
    assert all(math.isfinite(trial["mean_held_out_kl"]) for trial in search)
    assert (
        not search
        or min(r["mean_held_out_kl"] for r in search[1:]) < (search[0]["mean_held_out_kl"])
    )
    start = merge(pair.dam(coefficients=str(average(merged, tmp_path))), tmp_path / "average")
    assert distance(pair, merged) < distance(pair, start)
    replayed = merge(pair.dam(coefficients=str(merged.path)), tmp_path / "replayed")
    assert replayed.model_bytes == merged.model_bytes
    assert (replayed.path / "tokenizer.json").read_bytes() == (
        merged.path / "tokenizer.json"
    ).read_bytes()


def average(merged: Merged, folder: Path) -> Path:
    """Coefficients of the plain average."""
    fitted = merged.coefficients
    rows = {name: torch.full_like(own, 0.5) for name, own in fitted.coefficients.items()}
    path = folder / "averaged"
    path.mkdir()
    CoefficientFile(rows, fitted.sources, fitted.metadata).save(
        path / "dam_coefficients.safetensors"
    )
    return path


def distance(pair: Pair, merged: Merged) -> float:
    """KL of a merged model from the models themselves, on their text, in nats per token."""
    found = 0.0
    for model, text in zip(pair.models, pair.texts, strict=True):
        lines, columns = lines_of(text), own_columns(model, merged.path)
        own = logits_of(loaded(model), ids_of(model, lines))[..., : len(columns)].log_softmax(-1)
        new = logits_of(loaded(merged.path), ids_of(merged.path, lines)).log_softmax(-1)[
            ..., columns
        ]
        found += float((own.exp() * (own - new)).sum(-1).mean())
    return found
