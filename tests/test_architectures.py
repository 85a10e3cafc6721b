"""A whole merge of every architecture."""

import json
from pathlib import Path

import pytest

from mergekit_dam.errors import DamError
from tests.merging import dam, linear, merge, watched_reads
from tests.models import ARCHITECTURES, VOCABULARY, Models, save_calibration, save_models

UNREADABLE = {
    # architecture: a tensor that mergekit's definition lists and transformers 5 does not save
    "cohere": "model.layers.0.self_attn.q_norm.weight",
    "falcon": "lm_head.weight",
    "gpt-neox": "gpt_neox.layers.0.attention.bias",
}
"""Architectures that no method of mergekit 0.1.5 merges, `linear` included."""

AVERAGED = {
    "phi": {"lm_head.bias": "averaged: of the head, the weight alone is fitted"},
}
"""Architecture -> part of the names of tensors that are not fitted, and the reason reported."""

TRANSPOSED = {"gpt2"}
"""Architectures whose linears keep `[in, out]` weights: their coefficients run along axis 0."""


def save(name: str, folder: Path) -> tuple[Models, list[Path]]:
    """Two models of an architecture, and token ids for each.

    Ids, for what Qwen2's own tokenizer class makes of the words is one unknown word.
    """
    models = save_models(folder, ARCHITECTURES[name](), count=2)
    files = []
    for index in range(2):
        texts = save_calibration(folder / f"text_{index}.jsonl", seed=index, offset=24 * index)
        rows = [json.loads(line)["text"].split() for line in texts.read_text("utf-8").splitlines()]
        files.append(folder / f"ids_{index}.jsonl")
        ids = [json.dumps({"input_ids": [VOCABULARY.index(word) for word in row]}) for row in rows]
        files[-1].write_text("\n".join(ids), encoding="utf-8")
    return models, files


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - UNREADABLE.keys()))
def test_merges_and_loads(name: str, tmp_path: Path) -> None:
    models, texts = save(name, tmp_path)
    merged = merge(dam(models.models, texts, base=models.base, samples=8), tmp_path / "out")
    merged.load()
    fitted = [entry for entry in merged.entries.values() if entry["outcome"] == "fitted"]
    assert {entry["kind"] for entry in fitted} >= {"embedding", "linear", "norm"}
    assert all(entry["held_out_fitted"] < entry["held_out_start"] for entry in fitted)
    averaged = {t: e["outcome"] for t, e in merged.entries.items() if "averaged" in e["outcome"]}
    assert averaged == {
        tensor: reason
        for part, reason in AVERAGED.get(name, {}).items()
        for tensor in merged.tensors
        if part in tensor
    }
    replay = dam(models.models, base=models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "again").model_bytes == merged.model_bytes


@pytest.mark.parametrize("name", sorted(TRANSPOSED))
def test_transposed_weights_have_coefficients_along_their_first_axis(
    name: str, tmp_path: Path
) -> None:
    models, texts = save(name, tmp_path)
    merged = merge(dam(models.models, texts), tmp_path / "out")
    axes = merged.coefficients.metadata["axes"]
    fitted = {
        t for t, e in merged.entries.items() if (e["kind"], e["outcome"]) == ("linear", "fitted")
    }
    assert fitted
    assert axes == dict.fromkeys(axes, 0)
    for tensor in fitted:
        assert axes[tensor] == 0
        rows = merged.coefficients.coefficients[tensor].shape[1]
        assert rows == merged.tensors[tensor].shape[0]


@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_what_mergekit_cannot_read_is_refused_before_a_weight_is_read(
    name: str, tmp_path: Path
) -> None:
    models, texts = save(name, tmp_path)
    with pytest.raises(RuntimeError, match="required but not present"):
        merge(linear(models.models), tmp_path / "linear")
    with watched_reads() as reads, pytest.raises(DamError, match=UNREADABLE[name]):
        merge(dam(models.models, texts), tmp_path / "out")
    assert reads.order == []
    assert not (tmp_path / "out").exists()
