"""Penalties of coefficients: by hand, by finite differences, and as the reference has them."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mergekit_dam.search import regularisers
from mergekit_dam.search.regularisers import (
    column_weights,
    l1,
    l2,
    overlap,
    penalty,
    similarity,
    weighted_overlap,
)
from tests.kit.settings import logits_settings
from tests.kit.tensors import randn

Penalty = Callable[[Tensor], Tensor]

random = partial(randn, dtype=torch.float64)


def weighted(coefficients: Tensor) -> Tensor:
    """A weighted overlap whose weights differ from pair to pair."""
    models, columns = coefficients.shape
    return weighted_overlap(coefficients, random(math.comb(models, 2), columns, seed=9).abs())


ALL: dict[str, Penalty] = {
    "similarity": similarity,
    "l1": l1,
    "l2": l2,
    "overlap": overlap,
    "weighted": weighted,
}


def gradient(function: Penalty, coefficients: Tensor) -> Tensor:
    leaf = coefficients.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf)
    return found


def test_penalties_of_two_small_vectors_are_those_worked_out_by_hand() -> None:
    coefficients = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
    assert float(similarity(coefficients)) == pytest.approx(-8 / (5 * 2))
    assert float(l1(coefficients)) == 9
    assert float(l2(coefficients)) == 7
    assert float(overlap(coefficients)) == 2
    assert float(weighted_overlap(coefficients, torch.tensor([[5.0, 0.25]]))) == 0.5


@pytest.mark.parametrize("models", [2, 3, 4])
def test_penalties_are_those_of_the_reference(models: int) -> None:
    coefficients = random(models, 6)
    pairs = list(itertools.combinations(coefficients, 2))
    cosines = torch.stack([cosine_similarity(a, b, dim=0) for a, b in pairs])
    torch.testing.assert_close(similarity(coefficients), cosines.mean())
    smaller = torch.stack([torch.min(a.abs(), b.abs()) for a, b in pairs])
    torch.testing.assert_close(overlap(coefficients), smaller.sum(1).mean())
    weights = random(len(pairs), 6, seed=1).abs()
    expected = (smaller * weights).sum(1).mean()
    torch.testing.assert_close(weighted_overlap(coefficients, weights), expected)
    torch.testing.assert_close(
        l1(coefficients), torch.stack([c.norm(1) for c in coefficients]).sum()
    )
    torch.testing.assert_close(
        l2(coefficients), torch.stack([c.norm(2) for c in coefficients]).sum()
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("models", [1, 2, 4])
def test_gradients_agree_with_finite_differences(name: str, models: int) -> None:
    assert torch.autograd.gradcheck(ALL[name], (random(models, 5).requires_grad_(),))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_with_a_zero_vector_and_with_equals(
    name: str, dtype: torch.dtype
) -> None:
    zero = torch.zeros(2, 4, dtype=dtype)
    equal = torch.full((3, 4), 1 / 3, dtype=dtype)
    one_hot = torch.tensor([[1.0], [0.0], [0.0]], dtype=dtype).expand(-1, 4)
    for coefficients in (zero, equal, one_hot):
        assert ALL[name](coefficients).dtype == dtype
        assert ALL[name](coefficients).isfinite()
        assert gradient(ALL[name], coefficients).abs().max() <= 2


def test_a_zero_vector_is_pulled_nowhere() -> None:
    coefficients = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert float(similarity(coefficients)) == 0
    assert not gradient(similarity, coefficients).any()
    assert not gradient(l2, coefficients)[0].any()


def test_equal_coefficients_share_the_gradient_of_their_overlap() -> None:
    found = gradient(overlap, torch.tensor([[0.5, -0.5], [0.5, 0.5]]))
    assert found.tolist() == [[0.5, -0.5], [0.5, 0.5]]


@pytest.mark.parametrize("name", ["similarity", "overlap", "weighted"])
def test_one_model_has_no_pairs(name: str) -> None:
    coefficients = random(1, 5)
    assert float(ALL[name](coefficients)) == 0
    assert not gradient(ALL[name], coefficients).any()


def test_the_penalty_sums_all_that_is_on_over_the_tensors() -> None:
    coefficients = {"a": random(3, 5), "b": random(3, 2, seed=1)}
    weights = {"a": random(3, 5, seed=2).abs()}
    factors = {"similarity": 0.1, "l1": 0.2, "l2": 0.3, "overlap": 0.4, "weighted_overlap": 0.5}
    expected = torch.tensor(0.0, dtype=torch.float64)
    for name, function in {
        "similarity": similarity,
        "l1": l1,
        "l2": l2,
        "overlap": overlap,
    }.items():
        expected += factors[name] * sum(function(c) for c in coefficients.values())
    expected += 0.5 * weighted_overlap(coefficients["a"], weights["a"])
    found = penalty(coefficients, logits_settings(**factors), weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["similarity", "l1", "l2", "overlap", "weighted_overlap"])
def test_each_penalty_is_switched_by_its_own_weight(name: str) -> None:
    coefficients, weights = random(3, 5), random(3, 5, seed=2).abs()
    alone = {
        "similarity": similarity(coefficients),
        "l1": l1(coefficients),
        "l2": l2(coefficients),
        "overlap": overlap(coefficients),
        "weighted_overlap": weighted_overlap(coefficients, weights),
    }
    found = penalty({"a": coefficients}, logits_settings(**{name: 2.0}), {"a": weights})
    torch.testing.assert_close(found, 2 * alone[name])


def test_nothing_on_and_no_tensors_cost_nothing() -> None:
    assert float(penalty({"a": random(3, 5)}, logits_settings(), {})) == 0
    assert float(penalty({}, logits_settings(l1=1.0), {})) == 0


def test_columns_weigh_by_their_angle() -> None:
    base = torch.tensor([[5.0, 5.0, 5.0, 5.0, 5.0], [7.0, 7.0, 7.0, 7.0, 7.0]])
    one = base + torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    # At 45, 90, 180 and 30 degrees, and against a column that did not move.
    two = base + torch.tensor([[2.0, 0.0, -1.0, 3**0.5, 1.0], [2.0, 1.0, 0.0, 1.0, 0.0]])
    found = column_weights([one, two], base)
    expected = torch.tensor([[1.0, 0.0, 0.0, 0.75, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not found[0, 4]


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_column_weights_are_those_of_the_reference_however_the_rows_are_cut(
    axis: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regularisers, "ROWS", rows)
    base, *models = random(5, 9, 6)
    expected = []
    for first, second in itertools.combinations([model - base for model in models], 2):
        cosine = (first * second).sum(0) / (first.norm(dim=0) * second.norm(dim=0))
        expected.append(torch.sin(2 * torch.acos(cosine)).square())
    facing = [tensor.T if axis == 0 else tensor for tensor in (base, *models)]
    copies = [tensor.clone() for tensor in facing]
    found = column_weights(facing[1:], facing[0], axis=axis)
    torch.testing.assert_close(found, torch.stack(expected))
    assert all(map(torch.equal, facing, copies))


def test_column_weights_of_parallel_columns_do_not_fall_below_zero_by_rounding() -> None:
    base = torch.zeros(300, 64, dtype=torch.float64)
    model = random(300, 64)
    found = column_weights([model, model / 3, -model / 7], base)
    assert found.min() >= 0
    assert found.max() < 1e-12


def test_column_weights_are_computed_in_fp64_of_any_dtype() -> None:
    base, *models = random(4, 300, 5).bfloat16()
    expected = column_weights([model.double() for model in models], base.double())
    found = column_weights(models, base)
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


def test_one_model_has_no_column_weights() -> None:
    assert column_weights([random(3, 4)], random(3, 4, seed=1)).shape == (0, 4)
