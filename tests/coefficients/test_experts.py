"""Coefficients of fused experts, and their gradient."""

import pytest
import torch

from mergekit_dam.coefficients.merge import (
    coefficient_gradient,
    column_counts,
    merge_weights,
    rows_of_expert,
)
from tests.kit.tensors import randn


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
