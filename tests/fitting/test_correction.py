"""The correction of a linear, against the dense solution of its quadratic."""

import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting import correction as correction_module
from mergekit_dam.fitting.correction import CorrectionProblem
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.problem import Term
from tests.kit.tensors import randn

OUT, IN = 5, 7


def term(seed: int, metric: Metric = PLAIN, scale: float = 1.0) -> Term:
    x = randn(40, IN, seed=seed).double() * torch.logspace(-1.5, 0.5, IN)
    return Term(x.T @ x, randn(OUT, IN, seed=seed + 100).double(), metric, scale)


def metric(seed: int, *, as_rows: bool) -> Metric:
    factors = randn(2 if as_rows else OUT, OUT, seed=seed)
    return Metric(factors if as_rows else factors.T @ factors, not as_rows, 0.3)


def matrix_of(own: Metric) -> Tensor:
    return own(torch.eye(OUT, dtype=torch.float64))


def dense(terms: list[Term], shift: float) -> Tensor:
    """The minimiser by the whole system of `OUT * IN` unknowns."""
    system = shift * torch.eye(OUT * IN, dtype=torch.float64)
    rhs = torch.zeros(OUT, IN, dtype=torch.float64)
    for own in terms:
        s = matrix_of(own.metric)
        system += own.scale * torch.kron(s, own.gram)
        rhs += own.scale * s @ own.residual
    solved: Tensor = torch.linalg.solve(system, rhs.flatten())
    return solved.reshape(OUT, IN)


TERMS = {
    "plain": [term(0)],
    "one metric": [term(0, metric(1, as_rows=False), 2.0)],
    "two metrics": [
        term(0, metric(1, as_rows=False), 0.5),
        term(2, metric(3, as_rows=True), 1.5),
    ],
}


@pytest.mark.parametrize("ridge", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", TERMS)
def test_a_correction_is_the_dense_minimiser(
    kind: str, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction_module, "MAX_ITERATIONS", 500)
    problem = CorrectionProblem(TERMS[kind], ridge)
    mean = sum(
        own.scale * float(matrix_of(own.metric).diagonal().mean() * own.gram.diagonal().mean())
        for own in TERMS[kind]
    )
    assert problem.shift == pytest.approx(ridge * mean, rel=1e-6)
    found = problem.solve(tolerance=1e-12)
    torch.testing.assert_close(found, dense(TERMS[kind], problem.shift), rtol=1e-6, atol=1e-8)
    again = CorrectionProblem(TERMS[kind], ridge).solve(2 * found, tolerance=1e-12)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_low_rank_is_the_best_in_the_metric_of_the_inputs(rank: int) -> None:
    """By Eckart and Young, of whitened matrices; the plain SVD is not."""
    problem = CorrectionProblem(TERMS["plain"], 1e-4)
    solved = problem.solve()
    assert problem.factor is not None

    def error(matrix: Tensor) -> float:
        assert problem.factor is not None
        return float(((solved - matrix) @ problem.factor).norm())

    found = problem.truncated(solved, rank)
    assert found.left is not None
    own = error(found.left.double() @ found.right.double())
    left, values, right = torch.linalg.svd(solved)
    plain = error(left[:, :rank] * values[:rank] @ right[:rank])
    best = float(torch.linalg.svdvals(solved @ problem.factor)[rank:].norm())
    assert own == pytest.approx(best, rel=1e-4)
    assert plain > 1.001 * own


def test_the_whole_rank_is_the_whole_matrix() -> None:
    problem = CorrectionProblem(TERMS["two metrics"], 1e-2)
    solved = problem.solve()
    found = problem.truncated(solved, 100)
    assert found.left is not None
    torch.testing.assert_close((found.left @ found.right).double(), solved, rtol=1e-4, atol=1e-5)


def test_inputs_without_energy_have_no_correction() -> None:
    nothing = Term(torch.zeros(IN, IN).double(), torch.zeros(OUT, IN).double())
    assert CorrectionProblem([nothing], 1e-2).factor is None
