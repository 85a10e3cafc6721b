"""Tensors merged by coefficients, and the gradient of the coefficients."""

import pytest
import torch
from mergekit.merge_methods import merge_tensors

from mergekit_dam.coefficients import merge as coefficients_module
from mergekit_dam.coefficients.merge import coefficient_gradient, merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from tests.kit.forms import WEIGHTS, random_tensors
from tests.kit.tensors import randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_one_hot_coefficients_return_the_source_bit_for_bit(
    dtype: torch.dtype, columns: int, source: int
) -> None:
    tensors = [t.to(dtype) for t in random_tensors(4, 6)]
    for tensor in tensors:
        tensor[0, 0], tensor[1, 1] = -0.0, 0.0
        tensor[2, 2] = torch.finfo(dtype).smallest_normal / 4
        tensor[3, 3] = torch.finfo(dtype).max
    coefficients = torch.zeros(3, columns)
    coefficients[source] = 1
    merged = merge_weights(tensors, coefficients).to(dtype)
    assert merged.view(torch.uint8).equal(tensors[source].view(torch.uint8))


def test_infinite_weights_of_a_source_left_out_do_not_spread() -> None:
    tensors = [torch.full((2, 2), float("inf")), torch.ones(2, 2)]
    assert merge_weights(tensors, torch.tensor([[0.0], [1.0]])).equal(tensors[1])


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 4, 6)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_starting_coefficients_equal_mergekits_linear(
    shape: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    tensors = random_tensors(*shape)
    form = Parametrisation.create(weights, base=None, include_base=False, sum_to_one=True)
    merged = merge_weights(tensors, form.starting_coefficients())
    linear = merge_tensors(tensors, "linear", parameters={"weight": list(weights)})
    torch.testing.assert_close(merged, linear, rtol=0, atol=4e-7)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_coefficients_run_along_the_input_axis(axis: int) -> None:
    tensors = random_tensors(4, 6)
    coefficients = torch.randn(3, tensors[0].shape[axis])
    along = torch.diag_embed(coefficients)
    expected = (
        sum(c @ t for c, t in zip(along, tensors, strict=True))
        if axis == 0
        else sum(t @ c for t, c in zip(tensors, along, strict=True))
    )
    torch.testing.assert_close(merge_weights(tensors, coefficients, axis=axis), expected)


def test_a_scalar_is_merged_by_one_coefficient_a_source() -> None:
    merged = merge_weights([torch.tensor(2.0), torch.tensor(4.0)], torch.tensor([[0.5], [0.25]]))
    assert merged.shape == ()
    assert merged.item() == 2.0


def test_all_zero_coefficients_give_zeros_and_sources_are_not_changed() -> None:
    tensors = random_tensors(4, 6)
    before = [tensor.clone() for tensor in tensors]
    assert merge_weights(tensors, torch.zeros(3, 6)).equal(torch.zeros(4, 6))
    merge_weights(tensors, torch.randn(3, 6))
    merge_weights(tensors, torch.eye(3)[:, :1]).zero_()
    assert all(a.equal(b) for a, b in zip(tensors, before, strict=True))


def test_merging_is_in_fp32_whatever_the_sources_are() -> None:
    tensors = [t.bfloat16() for t in random_tensors(4, 6)]
    merged = merge_weights(tensors, torch.full((3, 1), 1 / 3))
    assert merged.dtype == torch.float32
    exact = sum((t.double() / 3 for t in tensors), torch.zeros(4, 6, dtype=torch.float64))
    torch.testing.assert_close(merged.double(), exact, rtol=0, atol=1e-6)


def test_a_missing_row_of_coefficients_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        merge_weights(random_tensors(4, 6), torch.ones(2, 6))


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
