"""The walk through a model: the fit of every stage, and the streams after it."""

from functools import cache, partial

import pytest
import torch
from transformers import PreTrainedModel

from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.layers.walk import walk_part
from mergekit_dam.model.part import block_part
from mergekit_dam.streams import storage as storage_module
from mergekit_dam.streams import stream as streams_module
from tests.kit.models import ARCHITECTURES, fine_tunes, make_model, parameters_of, tiny_llama_config
from tests.kit.parts import hidden_of
from tests.kit.tensors import LENGTH, randn, tokens_of
from tests.kit.walks import Merged, alike, merge_here, walk_of


@cache
def merged_tiny_models(name: str) -> tuple[list[PreTrainedModel], Merged]:
    """Two fine-tunes of an architecture, merged with defaults; they must not be changed."""
    config = ARCHITECTURES[name]()
    models = fine_tunes(config, 2)
    return models, merge_here(config, models)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_tensor_ends_worse_than_the_average_on_held_out_data(name: str) -> None:
    models, (merged, record, _) = merged_tiny_models(name)
    assert merged.keys() == dict(models[0].named_parameters()).keys()
    fitted = 0
    for report in record.reports.values():
        if report.outcome == "fitted":
            fitted += 1
            assert report.held_out_fitted is not None
            assert report.held_out_start is not None
            assert report.held_out_fitted < report.held_out_start
        elif report.outcome.startswith("start kept"):
            assert record.coefficients[report.name].equal(torch.full((2, 1), 0.5))
        else:
            assert report.outcome.startswith("averaged"), report
            assert report.kind == "other" or "head" in report.outcome
    assert fitted > len(merged) / 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_tensors_are_made_by_the_recorded_coefficients(name: str) -> None:
    models, (merged, record, _) = merged_tiny_models(name)
    weights = [dict(model.named_parameters()) for model in models]
    assert record.coefficients.keys() == merged.keys()
    for full, tensor in merged.items():
        again = merge_weights(
            [w[full].detach() for w in weights],
            record.coefficients[full],
            axis=record.axes.get(full, -1),
        )
        assert tensor.equal(again), full
        sums = record.coefficients[full].sum(0)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streams_end_as_the_models_own_hidden_states(name: str) -> None:
    """Teacher streams are the models'; merged streams those of a model with the merged weights."""
    models, (merged, _, streams) = merged_tiny_models(name)
    for stream in streams:
        tokens = tokens_of(stream.source)
        own = parameters_of(models[stream.source])
        torch.testing.assert_close(stream.teacher, hidden_of(models[0], own, tokens))
        torch.testing.assert_close(
            stream.merged, hidden_of(models[0], merged, tokens), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fitted_stream_is_nearer_to_the_teachers_than_the_averages(name: str) -> None:
    models, (_, _, streams) = merged_tiny_models(name)
    own = [parameters_of(model) for model in models]
    average = {n: (own[0][n] + own[1][n]) / 2 for n in own[0]}
    fitted = averaged = 0.0
    for stream in streams:
        hidden = hidden_of(models[0], average, tokens_of(stream.source))
        fitted += float((stream.merged[:] - stream.teacher[:]).norm() / stream.teacher[:].norm())
        averaged += float((hidden - stream.teacher[:]).norm() / stream.teacher[:].norm())
    assert fitted < averaged


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_data_of_one_model_alone_gives_back_that_model(name: str) -> None:
    """All targets can be met exactly, so at a tiny ridge every tensor becomes the teacher's.

    Left out: the head, fitted by gradients. Biases are alike, for weights are fitted next to the
    average of the biases, and make up for it; so are norms behind a linear, whose average the
    linear makes up for.
    """
    config = ARCHITECTURES[name]()
    models = fine_tunes(config, 2)
    alike(models, "bias")
    if name in ("gemma2", "gemma3", "olmo2"):
        alike(models, "post_attention_layernorm.weight")
        alike(models, "post_feedforward_layernorm.weight")
    merged, _, streams = merge_here(
        config, models, data={1: tokens_of(1, 24)}, ridge=1e-7, head=False
    )
    teacher, other = parameters_of(models[1]), parameters_of(models[0])
    for full, tensor in merged.items():
        if full != "lm_head.weight":
            apart = (teacher[full] - other[full]).norm()
            assert (tensor - teacher[full]).norm() <= 0.05 * apart, full
    drift = (streams[0].merged[:] - streams[0].teacher[:]).norm() / streams[0].teacher[:].norm()
    assert drift < 0.01


def test_a_merge_in_bfloat16_is_judged_and_passed_on_as_it_is_written() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    merged, record, streams = merge_here(config, models, dtype=torch.bfloat16, head=False)
    weights = [parameters_of(model) for model in models]
    for full, tensor in merged.items():
        again = merge_weights([w[full] for w in weights], record.coefficients[full])
        assert tensor.dtype == torch.bfloat16
        assert tensor.equal(again.bfloat16())
    written = {n: tensor.float() for n, tensor in merged.items()}
    for stream in streams:
        hidden = hidden_of(models[0], written, tokens_of(stream.source))
        torch.testing.assert_close(stream.merged, hidden, rtol=1e-4, atol=1e-4)


def test_identical_models_come_back_bit_for_bit() -> None:
    config = tiny_llama_config(attention_bias=True)
    models = [make_model(config) for _ in range(3)]
    merged, record, _ = merge_here(config, models)
    for full, parameter in models[0].named_parameters():
        torch.testing.assert_close(merged[full], parameter.detach(), rtol=0, atol=1e-6)
    assert {report.outcome for report in record.reports.values()} == {"identical in all models"}


def test_a_single_model_comes_back_bit_for_bit() -> None:
    config = tiny_llama_config(attention_bias=True)
    (model,) = fine_tunes(config, 1)
    merged, _, _ = merge_here(config, [model])
    for full, parameter in model.named_parameters():
        assert merged[full].equal(parameter), full


def test_only_tensors_that_differ_are_fitted() -> None:
    """As after a fine-tune with LoRA: most tensors are the base's."""
    config = tiny_llama_config()
    models = [make_model(config) for _ in range(2)]
    with torch.no_grad():
        models[1].get_parameter("model.layers.1.mlp.up_proj.weight").add_(0.1 * randn(24, 16))
    _, record, _ = merge_here(config, models, held_out=0)
    outcomes = {name: report.outcome for name, report in record.reports.items()}
    assert outcomes.pop("model.layers.1.mlp.up_proj.weight") == "fitted"
    assert set(outcomes.values()) == {"identical in all models"}


def test_switched_off_kinds_keep_the_average_and_say_so() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    _, record, _ = merge_here(config, models, embeddings=False, norms=False, head=False)
    off = [n for n in record.reports if "norm" in n or "embed" in n or "lm_head" in n]
    assert len(off) == 7
    for name, report in record.reports.items():
        assert (report.outcome == "averaged, as configured") == (name in off)


def test_one_coefficient_a_tensor_where_asked_for() -> None:
    config = tiny_llama_config()
    _, record, _ = merge_here(config, fine_tunes(config, 2), granularity="tensor")
    assert {c.shape for c in record.coefficients.values()} == {(2, 1)}
    assert sum(r.outcome == "fitted" for r in record.reports.values()) > 10


def test_the_same_merge_gives_the_same_bytes() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    first, _, _ = merge_here(config, models)
    second, _, _ = merge_here(config, models)
    assert all(second[name].equal(tensor) for name, tensor in first.items())


@pytest.mark.parametrize("name", ["llama", "olmo2", "cohere", "mixtral", "gpt2"])
def test_outputs_kept_in_memory_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ARCHITECTURES[name]()
    models = fine_tunes(config, 2)
    kept, _, kept_streams = merge_here(config, models, head=False)
    monkeypatch.setattr(storage_module, "SHARE", 0)
    again, _, streams = merge_here(config, models, head=False)
    torch.testing.assert_close(kept, {name: again[name] for name in kept}, rtol=0, atol=1e-6)
    for a, b in zip(kept_streams, streams, strict=True):
        torch.testing.assert_close(a.merged, b.merged, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.teacher, b.teacher, rtol=0, atol=1e-5)


def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    whole, _, _ = merge_here(config, models, ridge=1e-1, head=False)
    monkeypatch.setattr(streams_module, "CHUNK_TOKENS", 3 * LENGTH)
    chunked, _, _ = merge_here(config, models, ridge=1e-1, head=False)
    torch.testing.assert_close(whole, {name: chunked[name] for name in whole}, rtol=0, atol=1e-4)


def test_more_of_the_same_data_counts_no_more() -> None:
    """Every model's data is weighted by its energy, however much of it there is."""
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    once = {0: tokens_of(0), 1: tokens_of(1)}
    twice = {0: tokens_of(0).repeat(3, 1), 1: tokens_of(1)}
    a, _, _ = merge_here(config, models, data=once, held_out=0, head=False, ridge=1e-1)
    b, _, _ = merge_here(config, models, data=twice, held_out=0, head=False, ridge=1e-1)
    torch.testing.assert_close(a, {name: b[name] for name in a}, rtol=0, atol=1e-4)


def test_data_of_no_loss_weight_counts_for_nothing() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    silent, _, _ = merge_here(config, models, loss_weights=(1.0, 0.0), head=False)
    alone, _, _ = merge_here(config, models, data={0: tokens_of(0)}, head=False)
    torch.testing.assert_close(silent, {name: alone[name] for name in silent}, rtol=0, atol=1e-5)


def test_scaling_all_loss_weights_changes_nothing() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    a, _, _ = merge_here(config, models, loss_weights=(1.0, 3.0))
    b, _, _ = merge_here(config, models, loss_weights=(2.0, 6.0))
    torch.testing.assert_close(a, {name: b[name] for name in a}, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "granite", "cohere", "phi3", "mixtral"])
def test_the_fit_brings_a_displaced_stream_back_towards_the_teachers(name: str) -> None:
    """The models differ widely and little is displaced: their columns can make up for it."""
    x = randn(16, LENGTH, 16)
    displacement = 0.3 * randn(1, 1, 16, seed=1).expand_as(x)
    free = {"sum_to_one": False, "ridge": 1e-6}
    walk, _ = walk_of(name, partial(block_part, index=0), x, displacement, scale=1.0, **free)
    stream = walk.streams[0]
    with torch.no_grad():
        teacher = walk.part.run(walk.teacher_weights(stream), x)
        at_start = (walk.part.run(walk.weights, stream.merged[:]) - teacher).square().mean()
        own = (
            (walk.part.run(walk.teacher_weights(stream), stream.merged[:]) - teacher)
            .square()
            .mean()
        )
    walk_part(walk)
    torch.testing.assert_close(stream.teacher, teacher)
    fitted = (stream.merged[:] - teacher).square().mean()
    assert fitted < 0.5 * at_start
    assert fitted < own  # better than the teacher's own weights are on the displaced stream
