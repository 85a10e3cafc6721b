"""Sums of `x^T x` of which half is computed, and factors in the memory of their matrix."""

import pytest
import torch

from mergekit_dam.fitting.symmetric import add_products, cholesky, computed, mirror
from tests.kit.flops import CountedFlops

SIZES = (1, 127, 128, 129, 1000, 1031)


def rows(size: int, tokens: int = 7) -> torch.Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", SIZES)
def test_a_mirrored_sum_is_that_of_whole_products(size: int) -> None:
    total, expected = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    for chunk in rows(size), rows(size, 3):
        add_products(total, chunk)
        expected += chunk.T @ chunk
    mirror(total)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-5)
    assert total.equal(total.T)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_computed_is_what_is_counted(size: int) -> None:
    with CountedFlops() as counted:
        add_products(torch.zeros(size, size), rows(size, 5))
    assert counted.total == 2 * 5 * computed(size)


def test_wide_sums_take_little_more_than_half_the_work() -> None:
    assert computed(1024) / 1024**2 == (8 + 1) / 16
    assert computed(128) == 128**2


def test_a_factor_takes_the_place_of_its_matrix() -> None:
    x = rows(50, 80).double()
    matrix = x.T @ x
    expected, place = torch.linalg.cholesky(matrix), matrix.data_ptr()
    factor, failed = cholesky(matrix)
    assert not failed
    assert factor.data_ptr() == place
    torch.testing.assert_close(factor.tril(), expected)


def test_a_matrix_that_is_not_positive_definite_has_no_factor() -> None:
    assert cholesky(-torch.eye(3))[1]
