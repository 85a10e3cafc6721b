"""The fit of experts and routers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_dam.coefficients.tensors import TensorSources
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.moments import LinearMoments
from mergekit_dam.layers import experts as experts_module
from mergekit_dam.layers import groups as stages
from mergekit_dam.model.hooks import capture
from tests.kit.mixtures import CONFIGS, EXPERTS
from tests.kit.models import fine_tunes, make_model, parameters_of
from tests.kit.tensors import LENGTH, kl, tokens_of
from tests.kit.walks import alike, merge_here


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
        for name, weight in parameters_of(model).items():
            if weight.ndim != 3 and weight.shape[0] != EXPERTS:
                weight.copy_(base.get_parameter(name))
    return models


def words_of(half: int, *, seed: int, sequences: int = 40) -> Tensor:
    """Text of one half of the words."""
    return 32 * half + tokens_of(seed, sequences) % 32


@torch.no_grad()
def kl_of_weights(model: PreTrainedModel, tokens: Tensor, *weights: Mapping[str, Tensor]) -> float:
    """KL divergence from a teacher, in nats per token: the teacher's weights, then the merged."""
    return kl(*(functional_call(model, dict(own), (tokens,)).logits for own in weights))


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
        own = [parameters_of(model) for model in models]
        return sum(kl_of_weights(models[0], text[k], own[k], merged) for k in range(2))

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
    teacher, other = parameters_of(models[1]), parameters_of(models[0])
    own = [n for n, weight in teacher.items() if weight.ndim == 3 or weight.shape[0] == EXPERTS]
    assert len(own) >= 3
    for full in own:
        if not full.endswith("bias"):
            apart = (teacher[full] - other[full]).norm()
            assert (merged[full] - teacher[full]).norm() <= 0.05 * apart, full


def expert_evidence(
    monkeypatch: pytest.MonkeyPatch, config: PretrainedConfig, **settings: Any
) -> tuple[dict[str, Evidence[LinearMoments]], Any]:
    """The evidence that the linears of experts are fitted to, by name and number of the expert."""
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
    evidence, (models, (merged, _, _)) = expert_evidence(monkeypatch, config)
    tokens = tokens_of(1, 40)[:32]
    teacher, name = parameters_of(models[1]), "model.layers.0.mlp.experts"
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
        evidence, _ = expert_evidence(monkeypatch, config, experts=fed)
        counts = [own.fit[0].count for name, own in evidence.items() if "gate_up" in name]
        assert len(counts) == EXPERTS
        assert (max(counts) == pytest.approx(min(counts))) == (fed == "all")
