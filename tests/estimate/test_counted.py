"""The flops of the estimate against those that torch computes in whole tiny merges."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import MixtralConfig, PretrainedConfig

from mergekit_dam.choices import Granularity
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.tensors import TensorSettings, TensorSources
from mergekit_dam.estimate import flops
from mergekit_dam.estimate.inventory import Inventory, take_inventory
from mergekit_dam.estimate.memory import Room
from mergekit_dam.estimate.merge import plan_merge
from mergekit_dam.estimate.sweeps import Sweep, sweeps
from mergekit_dam.fitting import correction, costs
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.moments import InputMoments, LinearMoments, LinearTokens
from mergekit_dam.fitting.sizes import LinearSize, MetricSize
from mergekit_dam.streams import storage
from tests.kit.flops import CountedFlops
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import VOCAB_SIZE, save_models, tiny_llama_config
from tests.kit.texts import save_calibration

SAMPLES, LENGTH = 8, 64
GB = 10**9
ROOM = Room(host=64 * GB, gpu=0, disk=100 * GB, baseline=0, libraries=0, shard=5 * GB)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
"""Large enough that products of matrices are nearly all there is to count."""

FACTOR = 1.1
"""By which the estimate may differ, either way. Of all these merges, it differs by 1.04 at most."""


def llama() -> PretrainedConfig:
    return tiny_llama_config(**SIZES)


def mixture() -> PretrainedConfig:
    """Few experts, so that every one of them has tokens enough to be fitted."""
    return MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)


def planned_and_merged(
    folder: Path, config: PretrainedConfig, **parameters: Any
) -> tuple[Inventory, Merged, int]:
    """What the estimate knows of a merge, the merge itself, and the flops that were counted."""
    models = save_models(folder, config, count=2)
    texts = [save_calibration(folder / f"{seed}.jsonl", seed=seed) for seed in range(2)]
    parameters = {"samples": SAMPLES, "sequence_length": LENGTH, **parameters}
    configuration = dam(models.models, texts, base=models.base, **parameters)
    file = folder / "dam.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    LoaderCache.loaders.clear()
    plan = plan_merge(file, MergeOptions(quiet=True), folder / "out")
    with CountedFlops() as counted:
        merged = merge(configuration, folder / "out")
    return take_inventory(plan), merged, counted.total


def was_run(sweep: Sweep, merged: Merged) -> bool:
    """Whether a merge came to a sweep, by what its report says of the search."""
    trials = [trial["name"] for trial in merged.report["search"]]
    name = sweep.name.replace("layer fits", "layer").replace("descent", "logits")
    return sweep.certain or name in trials


LAYER, SENSITIVITY = {"metric": "identity"}, {"metric": "sensitivity"}
DESCENT = {"objective": "logits", "steps": 8}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        pytest.param(llama, LAYER, id="layer fits"),
        pytest.param(llama, SENSITIVITY, id="layer fits in metrics"),
        pytest.param(llama, DESCENT, id="descent"),
        pytest.param(llama, {**DESCENT, "correction": "low_rank"}, id="descent of factors"),
        pytest.param(mixture, {**DESCENT, "correction": "full"}, id="descent beside corrections"),
        pytest.param(llama, {**LAYER, "granularity": "tensor"}, id="a coefficient per tensor"),
        pytest.param(llama, {**LAYER, "correction": "full"}, id="corrections"),
        pytest.param(llama, {**LAYER, "correction": "low_rank"}, id="corrections of low rank"),
        pytest.param(llama, {**SENSITIVITY, "correction": "full"}, id="corrections in metrics"),
        pytest.param(mixture, LAYER, id="mixture"),
        pytest.param(mixture, {**LAYER, "correction": "full"}, id="mixture with corrections"),
        pytest.param(mixture, SENSITIVITY, id="mixture in metrics"),
        pytest.param(mixture, {**LAYER, "experts": "all"}, id="mixture, fed by all tokens"),
    ],
)
def test_flops_of_a_merge_are_those_that_are_computed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Callable[[], PretrainedConfig],
    parameters: dict[str, Any],
) -> None:
    for module in (costs, correction):  # how many are tried depends on the text
        monkeypatch.setattr(module, "RIDGES", (1e-1,))
    stock = correction._ridge  # and whether one is any good
    monkeypatch.setattr(correction, "_ridge", lambda p, loss, _: stock(p, loss, math.inf))
    found, merged, counted = planned_and_merged(tmp_path, config(), **parameters)
    for entry in merged.report["tensors"]:  # how tokens are routed is not known beforehand
        assert not any("fewer than" in reason for reason in entry.get("experts") or {})
    run = [sweep for sweep in sweeps(found, ROOM) if was_run(sweep, merged)]
    planned = sum(flops.total(sweep.work) for sweep in run)
    assert counted / FACTOR < planned < FACTOR * counted


def test_outputs_that_are_not_kept_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SHARE", 0)
    found, _, counted = planned_and_merged(tmp_path, llama(), metric="identity")
    (again,) = sweeps(found, ROOM)
    monkeypatch.undo()
    (kept,) = sweeps(found, ROOM)
    assert flops.total(again.work) > 1.2 * flops.total(kept.work)
    assert counted / FACTOR < flops.total(again.work) < FACTOR * counted


MODELS, OUT, COLUMNS, TOKENS, HELD_OUT = 2, 48, 40, 300, 60


@pytest.mark.parametrize("granularity", ["column", "tensor"])
@pytest.mark.parametrize(
    "gradients", [0, 20, 200], ids=["plain errors", "metric kept as rows", "metric as a matrix"]
)
def test_flops_of_a_linear_are_those_that_its_fit_computes(
    gradients: int, granularity: Granularity
) -> None:
    form = Parametrisation.create([1.0] * MODELS, base=None, include_base=False, sum_to_one=False)
    settings = TensorSettings(
        parametrisation=form,
        loss_weights=(1.0,) * MODELS,
        granularity=granularity,
        correction="none",
    )
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(OUT, COLUMNS, generator=generator) for _ in range(MODELS)]
    fit: list[LinearMoments] = []
    held_out: list[LinearTokens] = []
    with CountedFlops() as counted:
        for weight in weights:
            rows = torch.randn(gradients, OUT, generator=generator)
            metric = Metric.of_gradients(rows) if gradients else PLAIN
            inputs = InputMoments.zeros(COLUMNS, weight.device)
            sums = LinearMoments.zeros(OUT, inputs, metric, squares=not gradients)
            x = torch.randn(TOKENS, COLUMNS, generator=generator)
            sums.inputs.add(x, torch.ones(TOKENS))
            output = torch.nn.functional.linear(x, weight)
            sums.add(x, output, output, torch.ones(TOKENS))
            fit.append(sums)
            judge = LinearTokens(metric)
            judge.add(x[:HELD_OUT], output[:HELD_OUT], output[:HELD_OUT], torch.ones(HELD_OUT))
            held_out.append(judge)
        if not gradients:
            fit[0].add_scaled(fit.pop(), 1.0)
        evidence = Evidence(fit, held_out, MODELS)
        sources = TensorSources("weight", weights, settings, torch.float32)
        (fitted,) = fit_linear(sources, None, evidence, axis=-1)
    size = LinearSize(
        OUT,
        COLUMNS,
        unknowns=MODELS,
        sources=MODELS,
        models=MODELS,
        metric=MetricSize(OUT, gradients) if gradients else None,
        by_column=granularity == "column",
    )
    work = costs.input_moments(COLUMNS, MODELS * TOKENS, 0)
    work += costs.linear_moments(size, MODELS * TOKENS, 0, squares=0)
    work += costs.making_metrics(size.metric, MODELS)
    work += costs.judgement(size, MODELS * HELD_OUT) + costs.solution(size)
    # What this test computes itself, to have something to fit.
    planned = flops.total(work) + MODELS * 2 * TOKENS * OUT * COLUMNS
    assert counted.total == pytest.approx(planned, rel=0.015)
    assert fitted.report.solver["method"] == "cholesky"
