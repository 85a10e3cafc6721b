"""The walk through a model: what every stage is fitted to, and what becomes of the streams."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_dam.coefficients import merge as coefficients_module
from mergekit_dam.coefficients.merge import coefficient_gradient, merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import (
    FittedTensor,
    TensorSettings,
    TensorSources,
    TensorSpec,
)
from mergekit_dam.fitting.moments import InputMoments, LinearMoments
from mergekit_dam.layers import head as head_module
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.layers.gather import gather
from mergekit_dam.layers.head import fit_head
from mergekit_dam.layers.seen import Seen
from mergekit_dam.layers.state import Walk
from mergekit_dam.layers.targets import target
from mergekit_dam.layers.walk import walk_part
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.hooks import substitute
from mergekit_dam.model.part import Part, block_part, output_part
from mergekit_dam.model.units import Unit
from mergekit_dam.parameters import ExpertFeed
from mergekit_dam.sources.stage import Models, Stage, StageKind, open_stage
from mergekit_dam.streams import storage as storage_module
from mergekit_dam.streams import stream as streams_module
from mergekit_dam.streams.share import Split
from mergekit_dam.streams.stream import Stream
from tests.models import ARCHITECTURES, VOCAB_SIZE, fine_tune, make_model, tiny_llama_config
from tests.objective.made import run_settings

CPU = torch.device("cpu")
LENGTH = 12


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(seed: int, sequences: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (sequences, LENGTH), generator=generator)


def settings_of(
    count: int,
    *,
    base: int | None = None,
    sum_to_one: bool = True,
    ridge: float = 1e-3,
    granularity: str = "column",
    loss_weights: Sequence[float] | None = None,
    embeddings: bool = True,
    norms: bool = True,
    head: bool = True,
    experts: ExpertFeed = "routed",
) -> TensorSettings:
    return TensorSettings(
        parametrisation=Parametrisation.create(
            [1.0] * count, base=base, include_base=False, sum_to_one=sum_to_one
        ),
        loss_weights=tuple(loss_weights or [1.0] * count),
        ridge=ridge,
        granularity=granularity,
        embeddings=embeddings,
        norms=norms,
        head=head,
        experts=experts,
    )


def fine_tunes(config: PretrainedConfig, count: int, scale: float = 0.3) -> list[PreTrainedModel]:
    models = []
    for seed in range(count):
        models.append(make_model(config))
        fine_tune(models[-1], seed=100 + seed, scale=scale)
    return models


Merged = tuple[dict[str, Tensor], MergeRecord, list[Stream]]


@dataclass
class Merge:
    """A merge in process, without mergekit: every stage in turn, all models in memory."""

    config: PretrainedConfig
    models: Sequence[PreTrainedModel]
    streams: list[Stream]
    settings: TensorSettings
    dtype: torch.dtype | None = None

    def run(self) -> tuple[dict[str, Tensor], MergeRecord]:
        """Merged tensors by name, and the record."""
        decoder = Decoder(self.config, CPU)
        order = tuple(ModelReference.model_validate(f"m{i}") for i in range(len(self.models)))
        models = Models(decoder, (decoder,) * len(order), order, run_settings(0.25))
        weights = [dict(model.named_parameters()) for model in self.models]
        record, merged = MergeRecord(), dict[str, Tensor]()
        for kind, index in self._stages(decoder):
            names = [n for n in weights[0] if self._stage_of(decoder, n) == (kind, index)]
            plans = [TensorSpec(name, self.settings, self.dtype) for name in names]
            loaded = {
                name: {m: w[name].detach() for m, w in zip(order, weights, strict=True)}
                for name in names
            }
            stage = Stage(models, kind, index, plans)
            opened = open_stage(stage, loaded, CPU)
            result = fit_stage(opened, self.streams, record, show=lambda _: None)
            merged.update(result.merged)
        return merged, record

    @staticmethod
    def _stages(decoder: Decoder) -> list[tuple[StageKind, int]]:
        blocks: list[tuple[StageKind, int]] = [("block", i) for i in range(len(decoder.blocks))]
        return [("input", 0), *blocks, ("output", 0)]

    @staticmethod
    def _stage_of(decoder: Decoder, name: str) -> tuple[str, int]:
        block = decoder.block_of(name)
        return (
            ("block", block)
            if block is not None
            else (decoder.input_or_output(frozenset([name]))[name], 0)
        )


def merge(
    config: PretrainedConfig,
    models: Sequence[PreTrainedModel],
    *,
    data: Mapping[int, Tensor] | None = None,
    held_out: int = 2,
    dtype: torch.dtype | None = None,
    **settings: object,
) -> Merged:
    """Merge models on random tokens, different ones each; `data` by index of the model."""
    data = {k: tokens_of(k) for k in range(len(models))} if data is None else data
    streams = [Stream.of_tokens(k, tokens, held_out) for k, tokens in data.items()]
    settings_ = settings_of(len(models), **settings)  # type: ignore[arg-type]
    merged, record = Merge(config, models, streams, settings_, dtype).run()
    return merged, record, streams


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def alike(models: Sequence[PreTrainedModel], kind: str) -> None:
    """Give every model the first one's parameters whose name ends so."""
    with torch.no_grad():
        for model in models[1:]:
            for name, parameter in model.named_parameters():
                if name.endswith(kind):
                    parameter.copy_(models[0].get_parameter(name))


@torch.no_grad()
def hidden_of(model: PreTrainedModel, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """What leaves the last block of a whole model, run with other weights."""
    left: list[Tensor] = []

    def keep(_: object, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    name, count = Decoder(model.config, CPU).blocks_name, model.config.num_hidden_layers
    handle = model.get_submodule(f"{name}.{count - 1}").register_forward_hook(keep)
    torch.func.functional_call(model, dict(weights), (tokens,), {"use_cache": False})
    handle.remove()
    return left[0]


@cache
def merged_tiny_models(name: str) -> tuple[list[PreTrainedModel], Merged]:
    """Two fine-tunes of an architecture, merged with the defaults of `merge`; not to be changed."""
    config = ARCHITECTURES[name]()
    models = fine_tunes(config, 2)
    return models, merge(config, models)


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
        own = weights_of(models[stream.source])
        torch.testing.assert_close(stream.teacher, hidden_of(models[0], own, tokens))
        torch.testing.assert_close(
            stream.merged, hidden_of(models[0], merged, tokens), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fitted_stream_is_nearer_to_the_teachers_than_the_averages(name: str) -> None:
    models, (_, _, streams) = merged_tiny_models(name)
    own = [weights_of(model) for model in models]
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
    merged, _, streams = merge(config, models, data={1: tokens_of(1, 24)}, ridge=1e-7, head=False)
    teacher, other = weights_of(models[1]), weights_of(models[0])
    for full, tensor in merged.items():
        if full != "lm_head.weight":
            apart = (teacher[full] - other[full]).norm()
            assert (tensor - teacher[full]).norm() <= 0.05 * apart, full
    drift = (streams[0].merged[:] - streams[0].teacher[:]).norm() / streams[0].teacher[:].norm()
    assert drift < 0.01


def test_a_merge_in_bfloat16_is_judged_and_passed_on_as_it_is_written() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    merged, record, streams = merge(config, models, dtype=torch.bfloat16, head=False)
    weights = [weights_of(model) for model in models]
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
    merged, record, _ = merge(config, models)
    for full, parameter in models[0].named_parameters():
        torch.testing.assert_close(merged[full], parameter.detach(), rtol=0, atol=1e-6)
    assert {report.outcome for report in record.reports.values()} == {"identical in all models"}


def test_a_single_model_comes_back_bit_for_bit() -> None:
    config = tiny_llama_config(attention_bias=True)
    (model,) = fine_tunes(config, 1)
    merged, _, _ = merge(config, [model])
    for full, parameter in model.named_parameters():
        assert merged[full].equal(parameter), full


def test_only_tensors_that_differ_are_fitted() -> None:
    """As after a fine-tune with LoRA: most tensors are the base's."""
    config = tiny_llama_config()
    models = [make_model(config) for _ in range(2)]
    with torch.no_grad():
        models[1].get_parameter("model.layers.1.mlp.up_proj.weight").add_(0.1 * randn(24, 16))
    _, record, _ = merge(config, models, held_out=0)
    outcomes = {name: report.outcome for name, report in record.reports.items()}
    assert outcomes.pop("model.layers.1.mlp.up_proj.weight") == "fitted"
    assert set(outcomes.values()) == {"identical in all models"}


def test_switched_off_kinds_keep_the_average_and_say_so() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    _, record, _ = merge(config, models, embeddings=False, norms=False, head=False)
    off = [n for n in record.reports if "norm" in n or "embed" in n or "lm_head" in n]
    assert len(off) == 7
    for name, report in record.reports.items():
        assert (report.outcome == "averaged, as configured") == (name in off)


def test_one_coefficient_a_tensor_where_asked_for() -> None:
    config = tiny_llama_config()
    _, record, _ = merge(config, fine_tunes(config, 2), granularity="tensor")
    assert {c.shape for c in record.coefficients.values()} == {(2, 1)}
    assert sum(r.outcome == "fitted" for r in record.reports.values()) > 10


def test_the_same_merge_gives_the_same_bytes() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    first, _, _ = merge(config, models)
    second, _, _ = merge(config, models)
    assert all(second[name].equal(tensor) for name, tensor in first.items())


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float) -> None:
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", ["llama", "olmo2", "cohere", "mixtral", "gpt2"])
def test_outputs_kept_in_memory_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ARCHITECTURES[name]()
    models = fine_tunes(config, 2)
    kept, _, kept_streams = merge(config, models, head=False)
    monkeypatch.setattr(storage_module, "SHARE", 0)
    again, _, streams = merge(config, models, head=False)
    close(kept, again, 1e-6)
    for a, b in zip(kept_streams, streams, strict=True):
        torch.testing.assert_close(a.merged, b.merged, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.teacher, b.teacher, rtol=0, atol=1e-5)


def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    whole, _, _ = merge(config, models, ridge=1e-1, head=False)
    monkeypatch.setattr(streams_module, "CHUNK_TOKENS", 3 * LENGTH)
    chunked, _, _ = merge(config, models, ridge=1e-1, head=False)
    close(whole, chunked, 1e-4)


def test_more_of_the_same_data_counts_no_more() -> None:
    """Every model's data is weighted by its energy, however much of it there is."""
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    once = {0: tokens_of(0), 1: tokens_of(1)}
    twice = {0: tokens_of(0).repeat(3, 1), 1: tokens_of(1)}
    a, _, _ = merge(config, models, data=once, held_out=0, head=False, ridge=1e-1)
    b, _, _ = merge(config, models, data=twice, held_out=0, head=False, ridge=1e-1)
    close(a, b, 1e-4)


def test_data_of_no_loss_weight_counts_for_nothing() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    silent, _, _ = merge(config, models, loss_weights=(1.0, 0.0), head=False)
    alone, _, _ = merge(config, models, data={0: tokens_of(0)}, head=False)
    close(silent, alone, 1e-5)


def test_scaling_all_loss_weights_changes_nothing() -> None:
    config = tiny_llama_config()
    models = fine_tunes(config, 2)
    a, _, _ = merge(config, models, loss_weights=(1.0, 3.0))
    b, _, _ = merge(config, models, loss_weights=(2.0, 6.0))
    close(a, b, 1e-5)


@pytest.mark.parametrize("split", ["fit", "held_out", None])
@pytest.mark.parametrize("held_out", [0, 1, 3])
def test_chunks_cover_every_sequence_of_a_split_once(
    split: Split | None, held_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "CHUNK_TOKENS", 2 * LENGTH)
    stream = Stream.of_tokens(0, tokens_of(0, 7), held_out)
    covered = [i for chunk in stream.chunks(split) for i in range(7)[chunk]]
    border = 7 - held_out
    expected = {"fit": range(border), "held_out": range(border, 7), None: range(7)}[split]
    assert covered == list(expected)
    assert all(chunk.stop - chunk.start <= 2 for chunk in stream.chunks(split))


def walk_of(
    name: str,
    make: Callable[[Decoder], Part],
    entering: Tensor,
    displacement: Tensor | float,
    *,
    scale: float = 0.3,
    **settings: object,
) -> tuple[Walk, list[PreTrainedModel]]:
    """A walk at its start, through a part of two fine-tunes; the data is model 1's alone."""
    config = ARCHITECTURES[name]()
    models = fine_tunes(config, 2, scale)
    decoder = Decoder(config, CPU)
    part = make(decoder)
    places = decoder.input_or_output(frozenset(n for n, _ in models[0].named_parameters()))
    names = [
        n
        for n, _ in models[0].named_parameters()
        if (n.startswith(part.prefix) if part.prefix else places.get(n) == part.label)
    ]
    sources = {
        n.removeprefix(part.prefix): TensorSources(
            n,
            [model.get_parameter(n).detach() for model in models],
            settings_of(2, **settings),  # type: ignore[arg-type]
            torch.float32,
        )
        for n in names
    }
    weights = {n: s.merged(s.start()) for n, s in sources.items()}
    stream = Stream(1, entering, entering + displacement, 0)
    anatomy = part.anatomy(weights, entering)
    walk = Walk(part, [part, part], sources, [stream], anatomy, weights, lambda _: None)
    return walk, models


def targets(walk: Walk, unit: Unit) -> Tensor:
    """The target of a unit over all the data."""
    found: list[Tensor] = []
    stage = next(i for i, units in enumerate(walk.anatomy.groups) if unit in units)

    def add(_: Mapping[str, Any], seen: Seen) -> None:
        found.append(target(walk, unit, seen))

    def empty(_: Stream) -> dict[str, LinearMoments]:
        return {unit.name: LinearMoments.zeros(1, InputMoments.zeros(1, CPU))}

    with torch.no_grad():
        gather(walk, stage, [unit], empty=empty, judges=empty, add=add, pool=True)
    return torch.cat(found)


SEQUENTIAL = ("llama", "gpt2", "bloom", "granite", "qwen3", "starcoder2", "phi3")
PARALLEL = ("gpt-neox", "falcon", "cohere", "phi")


@pytest.mark.parametrize("name", [*SEQUENTIAL, *PARALLEL])
def test_a_last_writer_that_meets_its_target_ends_on_the_teachers_stream(name: str) -> None:
    """Whatever went before it: another model's weights, and a stream that has drifted."""
    x = randn(4, LENGTH, 16)
    walk, _ = walk_of(name, partial(block_part, index=0), x, 0.3 * randn(4, LENGTH, 16, seed=1))
    last = [unit for unit in walk.anatomy.units if unit.write][-1]
    wanted = targets(walk, last)
    with torch.no_grad(), substitute(walk.part.root, {last.name: wanted}):
        leaving = walk.part.run(walk.weights, walk.streams[0].merged[:])
    teacher = walk.part.run(walk.teacher_weights(walk.streams[0]), x)
    torch.testing.assert_close(leaving, teacher, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_first_writer_that_meets_its_target_sets_what_follows_right(name: str) -> None:
    """From the drifted stream, with the teacher's own weights behind the writer."""
    x = randn(4, LENGTH, 16)
    walk, _ = walk_of(name, partial(block_part, index=0), x, 0.3 * randn(4, LENGTH, 16, seed=1))
    first = next(unit for unit in walk.anatomy.units if unit.write)
    wanted = targets(walk, first)
    own = walk.teacher_weights(walk.streams[0])
    with torch.no_grad(), substitute(walk.part.root, {first.name: wanted}):
        leaving = walk.part.run(own, walk.streams[0].merged[:])
    torch.testing.assert_close(leaving, walk.part.run(own, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_a_writer_behind_a_norm_steers_it_to_where_the_teachers_stream_is(name: str) -> None:
    """What the norm puts out then points to what is missing; its size is the norm's own.

    The norm itself, fitted next, gets the whole of what is missing for its target.
    """
    x = randn(4, LENGTH, 16)
    walk, _ = walk_of(name, partial(block_part, index=0), x, 0.3 * randn(4, LENGTH, 16, seed=1))
    linear = [u for u in walk.anatomy.units if u.write and u.write.through][-1]
    norm = walk.anatomy.units[-1]
    assert linear.write is not None
    assert linear.write.through == norm.name
    own = walk.teacher_weights(walk.streams[0])
    with torch.no_grad():
        teacher = walk.part.run(own, x)
        with substitute(walk.part.root, {norm.name: targets(walk, norm)}):
            leaving = walk.part.run(walk.weights, walk.streams[0].merged[:])
        torch.testing.assert_close(leaving, teacher, rtol=0, atol=2e-5)

        wanted = targets(walk, norm)
        with substitute(walk.part.root, {linear.name: targets(walk, linear)}):
            reached = walk.part.captured(
                walk.weights, walk.streams[0].merged[:], outputs=(norm.name,)
            ).outputs[norm.name]
    gain = walk.weights[norm.parameter("weight")] + norm.unit_gain
    alike = torch.cosine_similarity(reached / gain, wanted / gain, dim=-1)
    assert alike.min() > 1 - 1e-5


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


def kl(walk: Walk, head: Tensor, temperature: float) -> float:
    """KL of the merged model to the teacher in nats a token, from logits by hand."""
    stream = walk.streams[0]
    with torch.no_grad():
        teacher = walk.part.run(walk.teacher_weights(stream), stream.teacher[:]) / temperature
        merged = walk.part.run({**walk.weights, "lm_head.weight": head}, stream.merged[:])
        merged = merged / temperature
        p, q = log_softmax(teacher, -1).double(), log_softmax(merged, -1).double()
        return float(kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


@torch.no_grad()
def fitted_head(walk: Walk, temperature: float = 1.0) -> FittedTensor:
    unit = next(unit for unit in walk.anatomy.units if unit.name == "lm_head")
    ((name, fitted),) = fit_head(walk, unit, temperature=temperature)
    assert name == "lm_head.weight"
    return fitted


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("granularity", ["column", "tensor"])
@pytest.mark.parametrize("name", ["llama", "granite", "phi"])
def test_the_heads_fit_lowers_the_kl(name: str, granularity: str, temperature: float) -> None:
    x = randn(6, LENGTH, 16)
    walk, _ = walk_of(name, output_part, x, 0.0, granularity=granularity)
    fitted = fitted_head(walk, temperature)
    report = fitted.report
    assert report.outcome == "fitted"
    start = walk.weights["lm_head.weight"]
    assert report.held_out_start == pytest.approx(kl(walk, start, temperature), rel=1e-4)
    assert report.held_out_fitted == pytest.approx(kl(walk, fitted.merged, temperature), rel=1e-4)
    assert kl(walk, fitted.merged, temperature) < 0.9 * kl(walk, start, temperature)


@pytest.mark.parametrize("rate", [3e-2, 30.0])
def test_a_head_that_can_only_get_worse_keeps_its_start(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged part starts as the teacher's, at a KL of zero."""
    monkeypatch.setattr(head_module, "LEARNING_RATE", rate)
    walk, _ = walk_of("llama", output_part, randn(6, LENGTH, 16), 0.0)
    norm, head = walk.sources["model.norm.weight"], walk.sources["lm_head.weight"]
    teacher = head.tensors[1]
    walk.sources = {
        "model.norm.weight": replace(norm, tensors=[norm.tensors[1]] * 2),
        # Three sources, of which the second is the average.
        "lm_head.weight": replace(
            head,
            tensors=[head.tensors[0], teacher, 2 * teacher - head.tensors[0]],
            settings=settings_of(3),
        ),
    }
    walk.weights = {n: s.merged(s.start()) for n, s in walk.sources.items()}
    fitted = fitted_head(walk)
    assert fitted.report.held_out_start == pytest.approx(0, abs=1e-6)
    assert fitted.report.outcome.startswith("start kept")
    assert fitted.coefficients.equal(torch.full((3, 1), 1 / 3))


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("size", [5, 1])
@pytest.mark.parametrize("rows_at_a_time", [8192, 4])
def test_the_gradient_of_the_coefficients_is_autograds(
    axis: int, size: int, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coefficients_module, "_PIECE", rows_at_a_time * size)
    tensors = [randn(9, 5, seed=s) for s in range(3)]
    tensors = [t.T if axis == 0 else t for t in tensors]
    coefficients = randn(3, size, seed=5).requires_grad_()
    shape = (3, -1, 1) if axis == 0 else (3, 1, -1)
    weight = (torch.stack(tensors) * coefficients.reshape(shape)).sum(0)
    gradient = randn(*weight.shape, seed=6)
    weight.backward(gradient)
    found = coefficient_gradient(tensors, gradient, axis=axis, per_column=size > 1)
    assert coefficients.grad is not None
    torch.testing.assert_close(found.float(), coefficients.grad)
