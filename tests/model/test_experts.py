"""Experts and routers are found by what they do."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_dam.model.anatomy import examine
from mergekit_dam.model.experts import run_expert
from mergekit_dam.model.part import block_part
from mergekit_dam.model.probe import make_decoder
from tests.kit.mixtures import CONFIGS, EXPERTS, FUSED, block_of
from tests.kit.models import make_model
from tests.kit.tensors import CPU, LENGTH, randn


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
    decoder = make_decoder(model.config, CPU)
    part = block_part(decoder, 1)
    assert decoder.names.canonical(name) == name
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
    make_decoder(CONFIGS["mixtral"](output_router_logits=True), CPU)


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
