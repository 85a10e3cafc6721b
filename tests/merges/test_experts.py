"""Whole merges of mixtures of experts."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.merge import column_counts, merge_weights, rows_of_expert
from mergekit_dam.errors import DamError
from mergekit_dam.host import fused as fused_module
from mergekit_dam.streams import stream as stream_module
from mergekit_dam.streams.storage import Storage
from tests.kit.merging import Merged, dam, linear, merge, tensors_of
from tests.kit.mixtures import CONFIGS, EXPERTS, FUSED, afmoe, fused_weights, save_mixtures
from tests.kit.processes import difference, finish, start_merges


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_is_merged_loaded_and_replayed(name: str, tmp_path: Path) -> None:
    models, texts = save_mixtures(name, tmp_path)
    merged = merge(
        dam(models.models, texts, base=models.base, samples=20, sequence_length=24),
        tmp_path / "out",
    )
    merged.load()
    axis = FUSED.get(name, -1)
    weights = fused_weights(merged.tensors)
    assert weights
    for tensor, weight in weights.items():
        entry = merged.entries[tensor]
        assert entry["kind"] == "experts"
        if entry["outcome"] == "fitted":
            columns = EXPERTS * weight.shape[axis]
            assert merged.coefficients.coefficients[tensor].shape == (3, columns)
            assert entry["held_out_fitted"] < entry["held_out_start"]
            kept = sum(map(len, entry.get("experts", {}).values()))
            assert entry["solver"]["experts"] + kept == EXPERTS
        else:
            assert entry["outcome"].startswith("start kept")
    outcomes = [merged.entries[tensor]["outcome"] for tensor in weights]
    assert outcomes.count("fitted") > len(outcomes) / 2
    assert {entry["kind"] for entry in merged.entries.values()} >= {"router", "experts", "linear"}
    replay = dam(models.models, base=models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "again").model_bytes == merged.model_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_one_hot_coefficients_give_back_a_mixture(name: str, tmp_path: Path) -> None:
    models, _ = save_mixtures(name, tmp_path)
    # mergekit's own copy: experts are fused as it loads them.
    copied = tensors_of(merge(linear(models.models[1:]), tmp_path / "copy").path)
    axis = FUSED.get(name, -1)
    one_hot = torch.tensor([[0.0], [1.0]])
    coefficients = {
        tensor: one_hot.expand(-1, column_counts(weight.shape, axis)[-1] if weight.ndim == 3 else 1)
        for tensor, weight in copied.items()
    }
    axes = {tensor: axis for tensor, weight in copied.items() if weight.ndim == 3}
    sources = tuple(str(path) for path in models.models)
    file = tmp_path / "one_hot.safetensors"
    CoefficientFile(coefficients, sources, {"axes": axes}).save(file)
    merged = merge(dam(models.models, coefficients=str(file)), tmp_path / "out").tensors
    assert merged.keys() == copied.keys()
    for tensor, weight in copied.items():
        assert merged[tensor].equal(weight), tensor


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_checkpoints_of_single_and_of_fused_experts_are_merged_alike(
    name: str, tmp_path: Path
) -> None:
    models, texts = save_mixtures(name, tmp_path)
    single = tensors_of(models.models[0])
    assert any(".experts.0." in tensor for tensor in single)
    refused = []
    for index, model in enumerate(models.models):
        copy = merge(linear([model]), tmp_path / f"fused_{index}")
        assert fused_weights(copy.tensors)
        refused.append(copy.path)
    merged = [
        merge(dam(own, texts, samples=12, sequence_length=24), tmp_path / f"out_{number}")
        for number, own in enumerate((models.models, refused))
    ]
    assert merged[0].model_bytes == merged[1].model_bytes


def test_experts_that_mergekit_plans_one_by_one_are_fitted_as_they_are_run(tmp_path: Path) -> None:
    """As one fused tensor, of which what mergekit planned is cut out again."""
    models, texts = save_mixtures(afmoe(), tmp_path)
    merged = merge(
        dam(models.models, texts, base=models.base, samples=20, sequence_length=24),
        tmp_path / "out",
    )
    model = merged.load()
    assert merged.tensors.keys() == tensors_of(models.base).keys()
    assert any(".experts.3.up_proj." in name for name in merged.tensors)
    folders = (*models.models, models.base)
    sources = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    for name in ("gate_up_proj", "down_proj"):
        full = f"model.layers.1.mlp.experts.{name}"
        assert merged.entries[full]["kind"] == "experts"
        assert merged.entries[full]["outcome"] == "fitted"
        rows = merged.coefficients.coefficients[full]
        weights = [source.get_parameter(full) for source in sources]
        assert merge_weights(weights, rows).equal(model.get_parameter(full))
    replay = dam(models.models, base=models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "again").model_bytes == merged.model_bytes


def test_one_hot_coefficients_give_back_experts_that_are_planned_one_by_one(tmp_path: Path) -> None:
    models, _ = save_mixtures(afmoe(), tmp_path)
    source = tensors_of(models.models[1])
    model = AutoModelForCausalLM.from_pretrained(models.models[1])
    one_hot = torch.tensor([[0.0], [1.0]])
    names = [name for name, _ in model.named_parameters()]
    sources = tuple(str(path) for path in models.models)
    file = tmp_path / "one_hot.safetensors"
    CoefficientFile(dict.fromkeys(names, one_hot), sources, {}).save(file)
    merged = merge(dam(models.models, coefficients=str(file)), tmp_path / "out").tensors
    assert merged.keys() == source.keys()
    for name, weight in source.items():
        assert merged[name].equal(weight), name


def test_fused_experts_are_those_of_the_layers_that_slices_name(tmp_path: Path) -> None:
    models, texts = save_mixtures(afmoe(num_dense_layers=0), tmp_path)
    configuration = dam(models.models, texts, samples=12, sequence_length=24)
    listed = configuration.pop("models")
    configuration["slices"] = [
        {"sources": [{**entry, "layer_range": [layer, layer + 1]} for entry in listed]}
        for layer in (1, 0)
    ]
    merged = merge(configuration, tmp_path / "out")
    model = merged.load()
    sources = [AutoModelForCausalLM.from_pretrained(path) for path in models.models]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            other = name.translate({ord("0"): "1", ord("1"): "0"})
            weights = [source.get_parameter(other) for source in sources]
            rows = merged.coefficients.coefficients[name]
            assert merge_weights(weights, rows).equal(parameter), name


def test_experts_that_transformers_transposes_are_not_split() -> None:
    """Where a piece does not lie in the fused tensor as it is, it cannot be cut out again."""
    experts = "model.layers.0.mlp.experts"
    names = [f"{experts}.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up")]
    stock = convert_checkpoint_tensors

    def turned(*args: Any) -> Tensor | None:
        whole = stock(*args)
        return None if whole is None else whole.transpose(1, 2)

    whole = f"{experts}.gate_up_proj"
    with mock.patch.object(fused_module, "convert", turned):
        assert fused_module._regions(whole, names, "afmoe") == {}
    regions = fused_module._regions(whole, names, "afmoe")
    assert {name: (r.expert, r.row, r.rows) for name, r in regions.items()} == {
        names[0]: (0, 0, 2),
        names[1]: (0, 1, 2),
        names[2]: (1, 0, 2),
        names[3]: (1, 1, 2),
    }


def test_coefficients_of_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    models, texts = save_mixtures("mixtral", tmp_path)
    merged = merge(dam(models.models, texts, samples=12, sequence_length=24), tmp_path / "out")
    coefficients = dict(merged.coefficients.coefficients)
    name = next(n for n, rows in coefficients.items() if rows.shape[1] == EXPERTS * 16)
    coefficients[name] = coefficients[name][:, : 2 * 16]
    file = tmp_path / "cut.safetensors"
    CoefficientFile(coefficients, merged.coefficients.sources, {}).save(file)
    with pytest.raises(
        DamError, match=f"{name}: required 64 coefficients per source, or 1, got 32"
    ):
        merge(dam(models.models, coefficients=str(file)), tmp_path / "again")


def test_one_coefficient_an_expert(tmp_path: Path) -> None:
    models, texts = save_mixtures("mixtral", tmp_path)
    configuration = dam(
        models.models, texts, samples=20, sequence_length=24, granularity="tensor", ridge=1e-3
    )
    merged = merge(configuration, tmp_path / "out")
    rows = merged.coefficients.coefficients
    found = set()
    for name, weight in fused_weights(merged.tensors).items():
        if merged.entries[name]["outcome"] == "fitted":
            own = rows[name].reshape(2, EXPERTS, -1)
            assert own.shape[2] == weight.shape[2]
            assert (own == own[:, :, :1]).all()
            found |= {float(c) for c in own[0, :, 0]}
    assert len(found) > 2
    replay = dam(models.models, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "again").model_bytes == merged.model_bytes


def test_experts_that_too_few_tokens_are_sent_to_keep_the_average_and_are_listed(
    tmp_path: Path,
) -> None:
    models, texts = save_mixtures("qwen3-moe", tmp_path)
    # 2 models, 3 sequences of 20 tokens each beside the held-out one, 2 experts of 4 a token.
    short = partial(dam, models.models, texts, samples=4, sequence_length=20)
    merged = merge(short(), tmp_path / "out")
    reason = "start kept: fewer than 64 calibration tokens were sent to it"
    listed = 0
    for tensor in fused_weights(merged.tensors):
        entry, rows = merged.entries[tensor], merged.coefficients.coefficients[tensor]
        few = entry["experts"].get(reason, [])
        listed += len(few)
        shape = merged.tensors[tensor].shape
        for expert in few:
            assert (rows_of_expert(rows, shape, -1, expert) == 0.5).all()
        if entry["outcome"] == "fitted":
            kept = {expert for own in entry["experts"].values() for expert in own}
            for expert in set(range(EXPERTS)) - kept:
                assert (rows_of_expert(rows, shape, -1, expert) != 0.5).any()
    assert listed > 0
    every = merge(short(experts="all"), tmp_path / "all")
    for tensor in fused_weights(every.tensors):
        assert reason not in every.entries[tensor].get("experts", {})


@pytest.mark.slow
def test_two_processes_fit_experts_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One sequence at a time, as the worker has it: chunks of others are rounded differently, and
    # a token between two experts would then be sent to another one.
    monkeypatch.setattr(stream_module, "CHUNK_TOKENS", 1)
    models, texts = save_mixtures("qwen2-moe", tmp_path)
    every = {
        metric: dam(models.models, texts, samples=16, sequence_length=16, metric=metric, ridge=0.1)
        for metric in ("identity", "sensitivity")
    }
    # The second process has nothing of the last model to judge by.
    every["few"] = dam(models.models, texts, samples=2, sequence_length=24, experts="all")
    two = tmp_path / "two"
    running = start_merges(every, two)
    one = {name: merge(own, tmp_path / "one" / name) for name, own in every.items()}
    finish(running)
    for name, expected in one.items():
        found = Merged(two / name)
        for tensor, entry in expected.entries.items():
            assert found.entries[tensor]["outcome"] == entry["outcome"], (name, tensor)
            assert found.entries[tensor].get("experts") == entry.get("experts"), (name, tensor)
        assert difference(found, expected) < 1e-4


@pytest.mark.parametrize("metric", ["identity", "sensitivity"])
def test_it_does_not_matter_where_streams_and_outputs_are_kept(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, texts = save_mixtures("qwen2-moe", tmp_path)
    configure = partial(dam, models.models, texts, samples=16, sequence_length=24, metric=metric)
    expected = merge(configure(), tmp_path / "host")
    on_disk = merge(configure(stream_offload="disk"), tmp_path / "disk")
    assert on_disk.model_bytes == expected.model_bytes
    monkeypatch.setattr(Storage, "has_room_for_outputs", lambda *_: False)
    again = merge(configure(), tmp_path / "again")
    for name, rows in expected.coefficients.coefficients.items():
        torch.testing.assert_close(
            again.coefficients.coefficients[name], rows, rtol=1e-3, atol=1e-4, msg=name
        )
