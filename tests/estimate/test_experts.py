"""Estimates for mixtures of experts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from mergekit_dam.estimate import flops
from mergekit_dam.estimate.fit_memory import fit_need
from mergekit_dam.estimate.inventory import Inventory, take_inventory
from mergekit_dam.estimate.merge import PlannedMerge, plan_merge
from mergekit_dam.model.part import block_part
from tests.kit.estimates import ROOM
from tests.kit.merging import dam
from tests.kit.mixtures import CONFIGS, EXPERTS, afmoe, block_of, save_mixtures
from tests.kit.tensors import randn


def planned(name: str | PretrainedConfig, folder: Path) -> tuple[PlannedMerge, Inventory]:
    models, texts = save_mixtures(name, folder)
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
    few, more = (flops.experts_fit(own, block, found, sensitivity=True) for own in (unit, many))
    assert more["solves", "cholesky"] == 16 * few["solves", "cholesky"]
    assert more["Gram matrices", "fp32"] == few["Gram matrices", "fp32"] > 0
    needs = [fit_need(own, found, ROOM, metrics=True) for own in (block, larger)]
    assert needs[0] == needs[1]
