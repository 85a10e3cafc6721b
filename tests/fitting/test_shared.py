"""Processes share the rows of what they solve."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting import correction_problem, problem
from mergekit_dam.fitting.moments import InputMoments, LinearMoments
from mergekit_dam.fitting.problem import Term
from tests.kit.flops import CountedFlops
from tests.kit.processes import process
from tests.kit.tensors import randn

OUT, IN = 7, 5
WEIGHT, BIAS = randn(OUT, IN, seed=0), randn(OUT, seed=1)
FACTOR = torch.linalg.cholesky(torch.eye(IN) + 0.1 * torch.ones(IN, IN))


def residual() -> Tensor:
    inputs = InputMoments(torch.eye(IN) + 0.5, randn(IN, seed=2).double())
    moments = LinearMoments.zeros(OUT, inputs)
    moments.cross += randn(OUT, IN, seed=3)
    return moments.residual(WEIGHT, BIAS)


def divided() -> Tensor:
    return correction_problem._divided(FACTOR, WEIGHT, upper=False)


def reaction() -> Tensor:
    return problem._times(WEIGHT, Term(torch.eye(IN) + 0.5, WEIGHT).gram)


@pytest.mark.parametrize("made", [residual, divided, reaction])
def test_every_process_makes_its_rows(made: Callable[[], Tensor]) -> None:
    """Here they are not brought together: that is what the merges of two processes test."""
    with CountedFlops() as counted:
        whole = made()
    rows = []
    for rank in range(3):
        with process(rank, 3), CountedFlops() as own:
            rows.append(made())
        assert own.total <= counted.total * 3 / OUT
    torch.testing.assert_close(torch.cat(rows), whole)
