"""The optimisers against torch's AdamW and the published rule; the schedules by hand."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from mergekit_dam.choices import Schedule
from mergekit_dam.search.optimizers import MoFO, make_optimizer, make_schedule
from tests.kit.settings import logits_settings
from tests.kit.tensors import randn

STEPS = 10


def made_optimizer(parameter: Tensor, **changes: Any) -> Optimizer:
    group = {"params": [parameter], "lr": logits_settings(**changes).learning_rate}
    return make_optimizer([group], logits_settings(**changes))


def descend(start: Tensor, gradients: Tensor, **changes: Any) -> list[Tensor]:
    """Where the parameter is after each of the given gradients."""
    parameter = start.clone().requires_grad_()
    optimizer = made_optimizer(parameter, **changes)
    path = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


def published_mofo(
    start: Tensor, gradients: Tensor, fraction: float, *, rate: float = 1e-2
) -> Tensor:
    """Adam as in its paper on one vector, moved in the entries of largest momentum only."""
    value, mean, square = start.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for step, gradient in enumerate(gradients.double(), start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        order = mean.abs().argsort(descending=True)
        chosen = order[: max(1, int(fraction * len(order)))]
        value = value.clone()
        value[chosen] -= rate * update[chosen]
    return value


def test_adamw_is_torch_adamw_without_weight_decay() -> None:
    start, gradients = randn(3, 5), randn(4, 3, 5, seed=1)
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.0)
    for gradient, found in zip(gradients, descend(start, gradients), strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(found, parameter.detach())


def test_nothing_decays_where_there_is_no_gradient() -> None:
    for name in ("adamw", "mofo"):
        (found,) = descend(torch.ones(2, 4), torch.zeros(1, 2, 4), optimizer=name)
        assert torch.equal(found, torch.ones(2, 4))


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_mofo_that_moves_everything_is_adamw_bit_for_bit(shape: tuple[int, ...]) -> None:
    start, gradients = randn(*shape), randn(6, *shape, seed=1)
    everything = descend(start, gradients, optimizer="mofo", mofo_fraction=1.0)
    for found, expected in zip(everything, descend(start, gradients), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_mofo_is_the_published_rule_on_every_model_by_itself(fraction: float) -> None:
    start, gradients = randn(3, 10), randn(8, 3, 10, seed=1)
    # One model's gradients outweigh the others': competing with them, it would be all that moves.
    gradients[:, 0] *= 100
    found = descend(start, gradients, optimizer="mofo", mofo_fraction=fraction)[-1]
    for model in range(3):
        expected = published_mofo(start[model], gradients[:, model], fraction)
        torch.testing.assert_close(found[model], expected.float())


def test_mofo_moves_the_entries_of_largest_momentum_not_of_largest_gradient() -> None:
    gradients = torch.tensor([[8.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    first, second = descend(torch.zeros(4), gradients, optimizer="mofo", mofo_fraction=0.25)
    assert first.ne(0).tolist() == [True, False, False, False]
    assert (second - first).ne(0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("fraction", [1e-9, 0.01])
def test_mofo_moves_one_entry_at_least(fraction: float) -> None:
    start, gradients = torch.zeros(2, 3), torch.tensor([[[1.0, 3.0, 2.0], [0.1, 0.0, 0.0]]])
    (found,) = descend(start, gradients, optimizer="mofo", mofo_fraction=fraction)
    assert found.ne(0).tolist() == [[False, True, False], [True, False, False]]
    (single,) = descend(torch.zeros(2, 1), torch.ones(1, 2, 1), optimizer="mofo")
    assert single.ne(0).all()


def test_equals_move_together() -> None:
    gradient = torch.tensor([[2.0, -2.0, 1.0, 2.0, 0.0]])
    (found,) = descend(torch.zeros(5), gradient, optimizer="mofo", mofo_fraction=0.4)
    assert found.ne(0).tolist() == [True, True, False, True, False]


def test_mofo_leaves_a_parameter_without_gradient_and_returns_the_loss() -> None:
    used, unused = torch.ones(3).requires_grad_(), torch.ones(3).requires_grad_()
    optimizer = MoFO([{"params": [used, unused], "lr": 0.1}], fraction=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 3
    assert torch.equal(unused.detach(), torch.ones(3))
    torch.testing.assert_close(used.detach(), torch.full((3,), 0.9))


def rates(**changes: Any) -> list[float]:
    """The learning rate of each step, as a fraction of its peak."""
    settings = logits_settings(learning_rate=0.5, **changes)
    optimizer = made_optimizer(torch.zeros(2).requires_grad_(), learning_rate=0.5)
    schedule = make_schedule(optimizer, settings, STEPS)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"] / 0.5)
        optimizer.step()
        schedule.step()
    return found


def test_schedules_go_the_way_of_their_names() -> None:
    assert rates(lr_schedule="constant") == [1.0] * 10
    assert rates(lr_schedule="linear") == pytest.approx([1 - n / 10 for n in range(10)])
    half_wave = [(1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)]
    assert rates(lr_schedule="cosine") == pytest.approx(half_wave)
    root = [0.0, 0.5, *((2 / n) ** 0.5 for n in range(2, 10))]
    assert rates(lr_schedule="inverse_sqrt", warmup=0.2) == pytest.approx(root)


@pytest.mark.parametrize("name", get_args(Schedule))
@pytest.mark.parametrize(("warmup", "steps"), [(0.4, 4), (0.31, 4), (0.0, 0)])
def test_every_schedule_warms_up(name: Schedule, warmup: float, steps: int) -> None:
    found = rates(lr_schedule=name, warmup=warmup)
    assert found[: steps + 1] == pytest.approx([n / max(steps, 1) for n in range(steps)] + [1.0])
    assert all(a >= b for a, b in zip(found[steps:], found[steps + 1 :], strict=False))
