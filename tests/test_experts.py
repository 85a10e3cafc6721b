"""Mixtures of experts: what they are made of, and how experts and routers are fitted."""

import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax, silu
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.merge import (
    coefficient_gradient,
    column_counts,
    merge_weights,
    rows_of_expert,
)
from mergekit_dam.coefficients.tensors import TensorSources
from mergekit_dam.errors import DamError
from mergekit_dam.estimate import flops, memory
from mergekit_dam.estimate.inventory import Inventory, take_inventory
from mergekit_dam.estimate.merge import PlannedMerge, plan_merge
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.metric import Metric
from mergekit_dam.fitting.moments import InputMoments, LinearMoments
from mergekit_dam.layers import experts as experts_module
from mergekit_dam.layers import groups as stages
from mergekit_dam.layers.expert_metrics import ExpertGradients
from mergekit_dam.model.anatomy import examine
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.experts import run_expert
from mergekit_dam.model.hooks import capture
from mergekit_dam.model.part import Part, block_part
from mergekit_dam.sources import fused as fused_module
from mergekit_dam.streams.storage import Storage
from tests.merging import Merged, dam, linear, merge, tensors_of
from tests.models import Models, make_model, save_models, save_token_ids
from tests.networks import LENGTH, make
from tests.objective.test_gradient import check
from tests.test_distributed import difference, torchrun
from tests.test_plan import ROOM
from tests.test_walk import alike, fine_tunes, tokens_of, weights_of
from tests.test_walk import merge as merge_here

CPU = torch.device("cpu")
EXPERTS = 4

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
_HEADS: dict[str, Any] = {"head_dim": 8}
_OWN: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": 12}

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "mixtral": partial(MixtralConfig, **_SIZES, num_local_experts=EXPERTS),
    # With an expert that every token is sent to, as far as a gate lets it.
    "qwen2-moe": partial(Qwen2MoeConfig, **_SIZES, **_OWN, shared_expert_intermediate_size=20),
    "qwen3-moe": partial(Qwen3MoeConfig, **_SIZES, **_OWN, **_HEADS, norm_topk_prob=True),
    "olmoe": partial(OlmoeConfig, **_SIZES, num_experts=EXPERTS),
    # Transposed weights, biases, gate and up in turns.
    "gpt-oss": partial(GptOssConfig, **_SIZES, **_HEADS, num_local_experts=EXPERTS),
    # A dense block first; routers with a correction of their scores, which is a buffer.
    "glm4-moe": partial(
        Glm4MoeConfig,
        **_SIZES,
        **_HEADS,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=12,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
}
"""A tiny configuration of mixtures that mergekit defines, or infers."""

FUSED = {"gpt-oss": 1}
"""Input axis of fused weights, where it is not the last."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def block_of(name: str) -> tuple[Part, dict[str, Tensor]]:
    """The last block of a tiny model, and its weights by relative names."""
    model = make_model(CONFIGS[name]())
    part = block_part(Decoder(model.config, CPU), 1)
    own = {
        full.removeprefix(part.prefix): weight.detach().clone()
        for full, weight in model.named_parameters()
        if full.startswith(part.prefix)
    }
    return part, own


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_and_routers_are_found_by_what_they_do(name: str) -> None:
    part, weights = block_of(name)
    anatomy = part.anatomy(weights, torch.zeros(1, 2, 16))
    (experts,) = (unit for unit in anatomy.units if unit.kind == "experts")
    (router,) = (unit for unit in anatomy.units if unit.kind == "router")
    axis = FUSED.get(name, -1)
    assert [(own.parameter, own.axis) for own in experts.linears] == [
        ("gate_up_proj", axis),
        ("down_proj", axis),
    ]
    assert experts.write is not None
    assert experts.write.scale == pytest.approx(1, abs=1e-4)
    assert weights[router.parameter("weight")].shape == (EXPERTS, 16)
    order = [unit.name for unit in anatomy.units]
    assert order.index(router.name) < order.index(experts.name)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_experts_one_by_one_add_up_to_all_of_them(name: str) -> None:
    part, weights = block_of(name)
    anatomy = part.anatomy(weights, torch.zeros(1, 2, 16))
    (unit,) = (unit for unit in anatomy.units if unit.kind == "experts")
    seen = part.captured(weights, randn(3, 5, 16), inputs=(unit.name,), outputs=(unit.name,))
    routing, module = seen.routing[unit.name], part.root.get_submodule(unit.name)
    total = torch.zeros_like(routing.hidden)
    for expert in range(EXPERTS):
        own = {p: weights[unit.parameter(p)][expert] for p in unit.parameters}
        total += routing.weight_of(expert)[:, None] * run_expert(module, own, routing.hidden)[0]
    torch.testing.assert_close(total, seen.outputs[unit.name].reshape(total.shape))


@torch.no_grad()
def test_a_routers_correction_of_its_scores_is_part_of_the_forward_pass() -> None:
    model = make_model(CONFIGS["glm4-moe"]())
    buffers = dict(model.named_buffers())
    (name,) = (n for n in buffers if n.endswith("e_score_correction_bias"))
    buffers[name].copy_(torch.tensor([3.0, -3.0, 2.0, -2.0]))
    decoder = Decoder(model.config, CPU)
    part = block_part(decoder, 1)
    assert decoder.canonical(name) == name
    own = {n: w for n, w in model.state_dict().items() if n.startswith(part.prefix)}
    weights = {n.removeprefix(part.prefix): w for n, w in own.items()}
    x = randn(1, LENGTH, 16)
    expected = decoder.run_block(1, weights, x)
    (unit,) = (u for u in part.anatomy(weights, x).units if u.kind == "experts")
    routing = part.captured(weights, x, inputs=(unit.name,)).routing[unit.name]
    assert set(routing.experts.unique().tolist()) == {0, 2}
    plain = weights | {n: torch.zeros_like(w) for n, w in weights.items() if "correction" in n}
    assert not expected.allclose(decoder.run_block(1, plain, x), atol=1e-2)


def test_models_that_hand_out_their_routers_logits_are_cut_into_blocks_too() -> None:
    Decoder(CONFIGS["mixtral"](output_router_logits=True), CPU)


class Listed(nn.Module):
    """A block as remote code may have it: its experts are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Linear(8, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(EXPERTS))
        self.last = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden).reshape(-1, 8)
        chosen, total = self.gate(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                total[rows] = expert(x[rows])
        hidden = hidden + total.reshape(hidden.shape)
        leaving: Tensor = hidden + self.last(hidden)
        return leaving


@pytest.mark.parametrize("seed", range(4))
def test_experts_that_are_modules_of_their_own_are_averaged(seed: int) -> None:
    """As linears they would be fitted to what teachers make of other tokens."""
    block = Listed()
    weights = {
        n: randn(*p.shape, seed=i + 9 * seed) for i, (n, p) in enumerate(block.named_parameters())
    }
    x = randn(1, 6, 8)
    anatomy = examine(block, lambda: functional_call(block, weights, (x,)), weights, x)
    kinds = {unit.name: unit.kind for unit in anatomy.units}
    experts = {name: kind for name, kind in kinds.items() if name.startswith("experts.")}
    assert experts
    assert set(experts.values()) == {"other"}
    assert [kinds[name] for name in ("norm", "gate", "last")] == ["norm", "linear", "linear"]


@pytest.mark.parametrize("axis", [-1, 1])
def test_every_expert_is_merged_by_coefficients_of_its_own(axis: int) -> None:
    tensors = [randn(3, 5, 7, seed=seed) for seed in range(2)]
    columns = tensors[0].shape[axis]
    coefficients = randn(2, 3 * columns, seed=9)
    merged = merge_weights(tensors, coefficients, axis=axis)
    for expert in range(3):
        own = rows_of_expert(coefficients, tensors[0].shape, axis, expert)
        assert own.equal(coefficients[:, expert * columns :][:, :columns])
        inside = {-1: -1, 1: 0}[axis]
        alone = merge_weights([tensor[expert] for tensor in tensors], own, axis=inside)
        torch.testing.assert_close(merged[expert], alone, rtol=0, atol=0)


def test_experts_of_one_model_each_come_back_as_they_are() -> None:
    tensors = [randn(3, 5, 7, seed=seed) for seed in range(2)]
    chosen = torch.tensor([0, 1, 0])
    coefficients = torch.stack([(chosen == k).float().repeat_interleave(7) for k in range(2)])
    merged = merge_weights(tensors, coefficients)
    for expert, source in enumerate(chosen.tolist()):
        assert merged[expert].equal(tensors[source][expert])


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_gradient_of_experts_coefficients_is_autograds(axis: int) -> None:
    tensors = [randn(3, 5, 7, seed=seed) for seed in range(2)]
    columns = tensors[0].shape[axis]
    coefficients = randn(2, 3 * columns, seed=9, dtype=torch.float64).requires_grad_(True)
    shape = (2, 3, 1, columns) if axis == -1 else (2, 3, columns, 1)
    merged = (torch.stack(tensors).double() * coefficients.reshape(shape)).sum(0)
    gradient = randn(3, 5, 7, seed=5)
    (expected,) = torch.autograd.grad(merged, coefficients, gradient.double())
    found = coefficient_gradient(tensors, gradient, axis=axis, per_column=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_coefficients_of_a_fused_tensor_are_one_or_by_column_or_by_expert_and_column() -> None:
    assert column_counts((3, 5, 7)) == (1, 7, 21)
    assert column_counts((3, 5, 7), 1) == (1, 5, 15)
    assert column_counts((5, 7)) == (1, 7)
    assert column_counts(()) == (1,)


def save(what: str | PretrainedConfig, folder: Path) -> tuple[Models, list[Path]]:
    """Two models, and token ids for each: what Qwen's own tokenizer makes of words is one word."""
    config = CONFIGS[what]() if isinstance(what, str) else what
    models = save_models(folder, config, count=2)
    return models, save_token_ids(folder)


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of experts, which mergekit writes fused."""
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim == 3}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_is_merged_loaded_and_replayed(name: str, tmp_path: Path) -> None:
    models, texts = save(name, tmp_path)
    merged = merge(
        dam(models.models, texts, base=models.base, samples=20, sequence_length=24),
        tmp_path / "out",
    )
    merged.load()
    axis = FUSED.get(name, -1)
    weights = fused(merged.tensors)
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
    models, _ = save(name, tmp_path)
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
    models, texts = save(name, tmp_path)
    single = tensors_of(models.models[0])
    assert any(".experts.0." in tensor for tensor in single)
    refused = []
    for index, model in enumerate(models.models):
        copy = merge(linear([model]), tmp_path / f"fused_{index}")
        assert fused(copy.tensors)
        refused.append(copy.path)
    merged = [
        merge(dam(own, texts, samples=12, sequence_length=24), tmp_path / f"out_{number}")
        for number, own in enumerate((models.models, refused))
    ]
    assert merged[0].model_bytes == merged[1].model_bytes


def afmoe(**sizes: Any) -> PretrainedConfig:
    """mergekit plans its experts one by one; its routers are plain linears."""
    own = {**_SIZES, **_HEADS, **_OWN, "num_dense_layers": 1, "num_shared_experts": 1, **sizes}
    return AfmoeConfig(**own, sliding_window=8, layer_types=["sliding_attention"] * 2)


def test_experts_that_mergekit_plans_one_by_one_are_fitted_as_they_are_run(tmp_path: Path) -> None:
    """As one fused tensor, of which what mergekit planned is cut out again."""
    models, texts = save(afmoe(), tmp_path)
    merged = merge(
        dam(models.models, texts, base=models.base, samples=20, sequence_length=24),
        tmp_path / "out",
    )
    model = merged.load()
    assert merged.tensors.keys() == tensors_of(models.base).keys()
    assert any(".experts.3.up_proj." in name for name in merged.tensors)
    sources = [AutoModelForCausalLM.from_pretrained(path) for path in merged.coefficients.sources]
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
    models, _ = save(afmoe(), tmp_path)
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
    models, texts = save(afmoe(num_dense_layers=0), tmp_path)
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


def test_what_transformers_turns_around_is_not_taken_apart() -> None:
    """Where a piece does not lie in the fused tensor as it is, it cannot be cut out again."""
    experts = "model.layers.0.mlp.experts"
    names = [f"{experts}.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up")]
    stock = convert_checkpoint_tensors

    def turned(*args: Any) -> Tensor | None:
        whole = stock(*args)
        return None if whole is None else whole.transpose(1, 2)

    whole = f"{experts}.gate_up_proj"
    with mock.patch.object(fused_module, "convert_checkpoint_tensors", turned):
        assert fused_module._regions(whole, names, "afmoe") == {}
    regions = fused_module._regions(whole, names, "afmoe")
    assert {name: (r.expert, r.row, r.rows) for name, r in regions.items()} == {
        names[0]: (0, 0, 2),
        names[1]: (0, 1, 2),
        names[2]: (1, 0, 2),
        names[3]: (1, 1, 2),
    }


def test_coefficients_of_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    models, texts = save("mixtral", tmp_path)
    merged = merge(dam(models.models, texts, samples=12, sequence_length=24), tmp_path / "out")
    coefficients = dict(merged.coefficients.coefficients)
    name = next(n for n, rows in coefficients.items() if rows.shape[1] == EXPERTS * 16)
    coefficients[name] = coefficients[name][:, : 2 * 16]
    file = tmp_path / "cut.safetensors"
    CoefficientFile(coefficients, merged.coefficients.sources, {}).save(file)
    with pytest.raises(DamError, match=f"{name}: required 64 coefficients a model, got 32"):
        merge(dam(models.models, coefficients=str(file)), tmp_path / "again")


@torch.no_grad()
def specialists(config: PretrainedConfig) -> list[PreTrainedModel]:
    """Two models whose experts and routers differ, each made for one half of the words.

    Words of the first half are embedded in the even features, those of the second in the odd ones.
    """
    base, *models = [make_model(config), *fine_tunes(config, 2, scale=0.8)]
    embedding = base.get_parameter("model.embed_tokens.weight")
    embedding[:32, 1::2] = 0
    embedding[32:, 0::2] = 0
    embedding.mul_(30)  # what attention adds, in all features, is little beside it
    for model in models:
        for name, weight in weights_of(model).items():
            if weight.ndim != 3 and weight.shape[0] != EXPERTS:
                weight.copy_(base.get_parameter(name))
    return models


def words_of(half: int, *, seed: int, sequences: int = 40) -> Tensor:
    """Text of one half of the words."""
    return 32 * half + tokens_of(seed, sequences) % 32


@torch.no_grad()
def kl(model: PreTrainedModel, tokens: Tensor, *weights: Mapping[str, Tensor]) -> float:
    """From a teacher to a merged model in nats per token; their weights in this order."""
    p, q = (log_softmax(functional_call(model, dict(own), (tokens,)).logits, -1) for own in weights)
    return float(kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_fitted_experts_and_routers_come_nearer_to_the_teachers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than averaged ones do, on text that the fit has not seen."""
    config = CONFIGS[name]()
    models = specialists(config)

    def apart(*left_out: str) -> float:
        data = {k: words_of(k, seed=k) for k in range(2)}
        with monkeypatch.context() as patch:
            for kind in left_out:
                patch.delitem(stages.FITS, kind)
            merged, _, _ = merge_here(config, models, data=data, held_out=8, head=False)
        text = [words_of(k, seed=9) for k in range(2)]
        own = [weights_of(model) for model in models]
        return sum(kl(models[0], text[k], own[k], merged) for k in range(2))

    fitted, averaged_routers, averaged = apart(), apart("router"), apart("router", "experts")
    assert fitted < 0.8 * averaged_routers
    assert averaged_routers < 0.8 * averaged


@pytest.mark.parametrize("name", CONFIGS)
def test_the_data_of_one_model_alone_gives_back_its_experts(name: str) -> None:
    """All targets can be met exactly, as the routing can; biases, which are averaged, are alike."""
    config = CONFIGS[name](num_hidden_layers=1, first_k_dense_replace=0)
    models = fine_tunes(config, 2)
    alike(models, "bias")
    merged, _, _ = merge_here(
        config, models, data={1: tokens_of(1, 60)}, ridge=1e-9, head=False, held_out=6
    )
    teacher, other = weights_of(models[1]), weights_of(models[0])
    own = [n for n, weight in teacher.items() if weight.ndim == 3 or weight.shape[0] == EXPERTS]
    assert len(own) >= 3
    for full in own:
        if not full.endswith("bias"):
            apart = (teacher[full] - other[full]).norm()
            assert (merged[full] - teacher[full]).norm() <= 0.05 * apart, full


def evidence_of(
    monkeypatch: pytest.MonkeyPatch, config: PretrainedConfig, **settings: Any
) -> tuple[dict[str, Evidence[LinearMoments]], Any]:
    """What the linears of experts are fitted to, by name and number of the expert."""
    found: dict[str, Evidence[LinearMoments]] = {}

    def keep(weight: TensorSources, bias: None, evidence: Any, *, axis: int) -> Any:
        found[weight.name] = evidence
        return fit_linear(weight, bias, evidence, axis=axis)

    monkeypatch.setattr(experts_module, "fit_linear", keep)
    models = fine_tunes(config, 2)
    data = {1: tokens_of(1, 40)}
    run = merge_here(config, models, data=data, held_out=8, head=False, **settings)
    return found, (models, run)


@torch.no_grad()
def test_an_expert_is_fitted_to_its_teachers_on_the_tokens_that_are_sent_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the first block: by hand, from whole models."""
    config = CONFIGS["mixtral"](num_hidden_layers=1)
    evidence, (models, (merged, _, _)) = evidence_of(monkeypatch, config)
    tokens = tokens_of(1, 40)[:32]
    teacher, name = weights_of(models[1]), "model.layers.0.mlp.experts"
    fed = []
    for weights in (teacher, merged):
        with capture(models[0], inputs=(name,), outputs=(name,)) as captured:
            functional_call(models[0], dict(weights), (tokens,))
        fed.append(captured)
    routing, own = fed[1].routing[name], fed[0].inputs[name]
    energy = fed[0].outputs[name].square().sum(-1).reshape(32, LENGTH)
    counted = (energy / energy.median(1, keepdim=True).values).clamp_min(1).reciprocal().reshape(-1)
    for expert in range(EXPERTS):
        weight = counted * routing.weight_of(expert).square()
        rows = (weight > 0).nonzero()[:, 0]
        x, t, w = routing.hidden[rows], own[rows], weight[rows, None]
        wanted = t @ teacher[f"{name}.gate_up_proj"][expert].T
        up = evidence[f"{name}.gate_up_proj[{expert}]"].fit[0]
        scale = 1 / float((counted * energy.reshape(-1)).sum())
        close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-7, check_dtype=False)
        close(up.inputs.gram, scale * (x * w).T @ x)
        close(up.cross, scale * (wanted * w).T @ x)
        gate, value = (x @ merged[f"{name}.gate_up_proj"][expert].T).chunk(2, dim=1)
        inner = silu(gate) * value
        gate, value = wanted.chunk(2, dim=1)
        wanted = (silu(gate) * value) @ teacher[f"{name}.down_proj"][expert].T
        down = evidence[f"{name}.down_proj[{expert}]"].fit[0]
        close(down.inputs.gram, scale * (inner * w).T @ inner)
        close(down.cross, scale * (wanted * w).T @ inner)


def test_all_tokens_feed_every_expert_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CONFIGS["mixtral"](num_hidden_layers=1)
    for fed in ("routed", "all"):
        evidence, _ = evidence_of(monkeypatch, config, experts=fed)
        counts = [own.fit[0].count for name, own in evidence.items() if "gate_up" in name]
        assert len(counts) == EXPERTS
        assert (max(counts) == pytest.approx(min(counts))) == (fed == "all")


def test_one_coefficient_an_expert(tmp_path: Path) -> None:
    models, texts = save("mixtral", tmp_path)
    configuration = dam(
        models.models, texts, samples=20, sequence_length=24, granularity="tensor", ridge=1e-3
    )
    merged = merge(configuration, tmp_path / "out")
    rows = merged.coefficients.coefficients
    found = set()
    for name, weight in fused(merged.tensors).items():
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
    models, texts = save("qwen3-moe", tmp_path)
    # 2 models, 3 sequences of 20 tokens each beside the held-out one, 2 experts of 4 a token.
    short = partial(dam, models.models, texts, samples=4, sequence_length=20)
    merged = merge(short(), tmp_path / "out")
    reason = "start kept: fewer than 64 calibration tokens were sent to it"
    listed = 0
    for tensor in fused(merged.tensors):
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
    for tensor in fused(every.tensors):
        assert reason not in every.entries[tensor].get("experts", {})


def live_moments(experts: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Gram matrices that are made while a mixture is fitted, and the most alive at a time."""
    alive, made, most = 0, 0, 0
    stock = InputMoments.zeros

    def release() -> None:
        nonlocal alive
        alive -= 1

    def zeros(*args: Any) -> InputMoments:
        nonlocal alive, made, most
        moments = stock(*args)
        alive, made = alive + 1, made + 1
        most = max(most, alive)
        weakref.finalize(moments.gram, release)
        return moments

    config = CONFIGS["mixtral"](num_local_experts=experts, num_hidden_layers=1)
    models = fine_tunes(config, 2)
    data = {k: tokens_of(k, 64) for k in range(2)}
    with monkeypatch.context() as patch:
        patch.setattr(experts_module, "FEWEST", 1)
        patch.setattr(InputMoments, "zeros", zeros)
        merge_here(config, models, data=data, head=False)
    return made, most


def test_the_moments_of_one_expert_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    few, most_of_few = live_moments(4, monkeypatch)
    many, most_of_many = live_moments(32, monkeypatch)
    assert many > few + 32
    assert most_of_many == most_of_few <= 4


def test_the_metric_of_an_expert_is_that_of_the_tokens_that_are_sent_to_it() -> None:
    part, weights = block_of("mixtral")
    (unit,) = (u for u in part.anatomy(weights, torch.zeros(1, 2, 16)).units if u.linears)
    routing = part.captured(weights, randn(4, 9, 16), inputs=(unit.name,)).routing[unit.name]
    gradients = randn(36, 16, seed=3)
    own = {p: weights[unit.parameter(p)] for p in unit.parameters}
    felt = ExpertGradients(
        routing, gradients, lambda e: {p: weight[e] for p, weight in own.items()}
    )
    module = part.root.get_submodule(unit.name)
    for expert in range(EXPERTS):
        rows = (routing.experts == expert).any(1)
        x = routing.hidden[rows]
        inner = (x @ own["gate_up_proj"][expert].T).requires_grad_(True)
        gate, value = inner.chunk(2, dim=1)
        output = (silu(gate) * value) @ own["down_proj"][expert].T
        (up,) = torch.autograd.grad(output, inner, gradients[rows])
        found = felt.metrics(module, expert)
        for name, expected in (("gate_up_proj", up), ("down_proj", gradients[rows])):
            metric = Metric.of_gradients(expected)
            assert metric.factors is not None
            torch.testing.assert_close(found[name].factors, metric.factors)
            assert found[name].shift == pytest.approx(metric.shift)


def test_an_expert_that_no_token_is_sent_to_has_the_metric_of_all_tokens() -> None:
    part, weights = block_of("mixtral")
    (unit,) = (u for u in part.anatomy(weights, torch.zeros(1, 2, 16)).units if u.linears)
    routing = part.captured(weights, randn(4, 9, 16), inputs=(unit.name,)).routing[unit.name]
    own = {p: weights[unit.parameter(p)] for p in unit.parameters}
    gradients = randn(36, 16, seed=3)
    elsewhere = routing._replace(experts=torch.zeros_like(routing.experts))
    felt = ExpertGradients(
        elsewhere, gradients, lambda e: {p: weight[e] for p, weight in own.items()}
    )
    found = felt.metrics(part.root.get_submodule(unit.name), 2)["down_proj"]
    expected = Metric.of_gradients(gradients)
    assert expected.factors is not None
    torch.testing.assert_close(found.factors, expected.factors)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_gradients_of_experts_coefficients_are_those_of_the_whole_network(
    name: str, tmp_path: Path
) -> None:
    made = make(config=CONFIGS[name]())
    check(made, tmp_path)
    experts = [own for own in made.coordinates.values() if own.kind == "experts"]
    columns = {"mixtral": {16, 24}, "qwen2-moe": {16, 12}, "gpt-oss": {16, 24}}[name]
    assert {own.columns for own in experts} == {EXPERTS * size for size in columns}
    assert [own.kind for own in made.coordinates.values()].count("router") == 2


def test_a_search_fits_experts_in_the_metric_and_end_to_end(tmp_path: Path) -> None:
    models, texts = save("qwen2-moe", tmp_path)
    configuration = dam(
        models.models,
        texts,
        base=models.base,
        samples=16,
        sequence_length=24,
        objective="layer+logits",
        metric="sensitivity",
        steps=8,
    )
    merged = merge(configuration, tmp_path / "out")
    merged.load()
    trials = {trial["name"]: trial for trial in merged.report["search"]}
    assert trials["layer, sensitivity"]["kept"]
    replay = dam(models.models, base=models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "again").model_bytes == merged.model_bytes
    go_on = dam(models.models, texts, base=models.base, objective="logits", steps=1)
    go_on["parameters"] |= {"start": str(merged.path), "samples": 16, "sequence_length": 24}
    again = merge(go_on, tmp_path / "on")
    assert again.report["search"][0]["mean_held_out_kl"] == pytest.approx(
        min(trial["mean_held_out_kl"] for trial in trials.values()), rel=1e-4
    )


def planned(name: str | PretrainedConfig, folder: Path) -> tuple[PlannedMerge, Inventory]:
    models, texts = save(name, folder)
    file = folder / "dam.yaml"
    file.write_text(json.dumps(dam(models.models, texts, metric="sensitivity")), encoding="utf-8")
    LoaderCache.loaders.clear()
    plan = plan_merge(file, MergeOptions(quiet=True), folder / "out")
    return plan, take_inventory(plan)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_takes_mixtures_apart_as_the_fit_does(name: str, tmp_path: Path) -> None:
    _, found = planned(name, tmp_path)
    part, weights = block_of(name)
    anatomy = part.anatomy(weights, torch.zeros(1, 2, 16))
    block = found.blocks[1]
    kinds = {unit.name: unit.kind for unit in anatomy.units}
    got = {unit.name: unit.kind for unit in block.units}
    assert got == kinds
    (unit,) = block.of("experts")
    assert (unit.experts, unit.sent) == (EXPERTS, 2)
    (own,) = (unit for unit in anatomy.units if unit.linears)
    for own_linear, expected in zip(unit.linears, own.linears, strict=True):
        shape = list(weights[own.parameter(expected.parameter)].shape[1:])
        assert own_linear.enters == shape.pop({-1: -1, 1: 0}[expected.axis])
        assert (own_linear.leaves,) == tuple(shape)


def test_a_plan_has_experts_that_mergekit_plans_one_by_one(tmp_path: Path) -> None:
    _, found = planned(afmoe(), tmp_path)
    (unit,) = found.blocks[1].of("experts")
    assert (unit.experts, unit.sent, len(unit.linears)) == (EXPERTS, 2, 2)
    model = AutoModelForCausalLM.from_config(afmoe())
    assert sum(own.parameters for own in found.tensors) == model.num_parameters()


def test_a_plan_counts_the_flops_of_experts_that_tokens_are_sent_to(tmp_path: Path) -> None:
    plan, found = planned("qwen2-moe", tmp_path)
    decoder = plan.stages[0].models.output
    decoder.model.set_attn_implementation("eager")  # type: ignore[operator]
    decoder.calls.cache_clear()
    part, weights = block_part(decoder, 1), block_of("qwen2-moe")[1]
    with FlopCounterMode(display=False) as counted:
        part.run(weights, randn(2, found.text.length, found.hidden))
    expected, _ = flops.forward(found.blocks[1], found, 2 * found.text.length)
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_a_plan_has_the_solves_of_all_experts_and_the_moments_of_one(tmp_path: Path) -> None:
    _, found = planned("mixtral", tmp_path)
    block = found.blocks[0]
    (unit,) = block.of("experts")
    many = replace(unit, experts=16 * EXPERTS)
    groups = tuple((many,) if own == (unit,) else own for own in block.groups)
    larger = replace(block, groups=groups)
    few, more = (
        flops.experts_fit(own, block.unknowns, found, sensitivity=True) for own in (unit, many)
    )
    assert more["solves", "cholesky"] == 16 * few["solves", "cholesky"]
    assert more["Gram matrices", "fp32"] == few["Gram matrices", "fp32"] > 0
    needs = [memory.fit_need(own, found, ROOM, metrics=True) for own in (block, larger)]
    assert needs[0] == needs[1]


@pytest.mark.slow
def test_two_processes_fit_experts_as_one_does(tmp_path: Path) -> None:
    models, texts = save("qwen2-moe", tmp_path)
    every = {
        metric: dam(models.models, texts, samples=16, sequence_length=16, metric=metric, ridge=0.1)
        for metric in ("identity", "sensitivity")
    }
    # The second process has nothing of the last model to judge by.
    every["few"] = dam(models.models, texts, samples=2, sequence_length=24, experts="all")
    two = tmp_path / "two"
    two.mkdir()
    (two / "merges.json").write_text(json.dumps(every), encoding="utf-8")
    running = torchrun("-m", "tests.shared_merges", two)
    one = {name: merge(own, tmp_path / "one" / name) for name, own in every.items()}
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output
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
    models, texts = save("qwen2-moe", tmp_path)
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
