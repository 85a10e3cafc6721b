"""Metrics of experts are those of the tokens that are sent to them."""

import pytest
import torch
from torch.nn.functional import silu

from mergekit_dam.fitting.metric import Metric
from mergekit_dam.layers.expert_metrics import ExpertGradients
from tests.kit.mixtures import EXPERTS, block_of
from tests.kit.tensors import randn


def test_the_metric_of_an_expert_is_that_of_the_tokens_that_are_sent_to_it() -> None:
    part, weights = block_of("mixtral")
    (unit,) = (u for u in part.anatomy(weights, torch.zeros(1, 2, 16)).units if u.linears)
    routing = part.captured(weights, randn(4, 9, 16), inputs=(unit.name,)).routing[unit.name]
    gradients = randn(36, 16, seed=3)
    own = {p: weights[unit.parameter(p)] for p in unit.parameters}
    expert_gradients = ExpertGradients(
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
        found = expert_gradients.metrics(module, expert)
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
    expert_gradients = ExpertGradients(
        elsewhere, gradients, lambda e: {p: weight[e] for p, weight in own.items()}
    )
    found = expert_gradients.metrics(part.root.get_submodule(unit.name), 2)["down_proj"]
    expected = Metric.of_gradients(gradients)
    assert expected.factors is not None
    torch.testing.assert_close(found.factors, expected.factors)
