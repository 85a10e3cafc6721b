"""The correction of a linear, against the dense solution of its quadratic."""

import logging

import pytest
import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction
from mergekit_dam.fitting import correction_problem
from mergekit_dam.fitting.correction_problem import CorrectionProblem
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.problem import Term
from tests.kit.fits import MODELS, evidence_of_domains, sources_of
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


@pytest.mark.parametrize("limit", [0, 100], ids=["factorised", "diagonalised"])
@pytest.mark.parametrize("ridge", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", TERMS)
def test_a_correction_is_the_dense_minimiser(
    kind: str, ridge: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction_problem, "MAX_ITERATIONS", 500)
    monkeypatch.setattr(correction_problem, "EIGEN_LIMIT", limit)
    problem = CorrectionProblem(TERMS[kind])
    mean = sum(
        own.scale * float(matrix_of(own.metric).diagonal().mean() * own.gram.diagonal().mean())
        for own in TERMS[kind]
    )
    assert problem.mean == pytest.approx(mean, rel=1e-6)
    found = step_of(problem, ridge)
    torch.testing.assert_close(found, dense(TERMS[kind], ridge * mean), rtol=1e-6, atol=1e-8)
    again = found if kind == "plain" else step_of(problem, ridge, 2 * found)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-8)


def step_of(problem: CorrectionProblem, ridge: float, start: Tensor | None = None) -> Tensor:
    start = problem.nearest(ridge) if start is None else start
    assert start is not None
    return problem.solve(ridge, start, tolerance=1e-12).step


def test_a_single_kronecker_product_is_solved_at_once() -> None:
    problem = CorrectionProblem(TERMS["one metric"])
    nearest = problem.nearest(1e-3)
    assert nearest is not None
    solved = problem.solve(1e-3, nearest, tolerance=1e-6)
    assert solved.iterations == 0
    assert solved.residual < 1e-6


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_low_rank_is_the_best_in_the_metric_of_the_inputs(rank: int) -> None:
    """By Eckart and Young, of whitened matrices; the plain SVD is not."""
    problem, ridge = CorrectionProblem(TERMS["plain"]), 1e-4
    solved, factor = step_of(problem, ridge), problem.factor(ridge)
    assert factor is not None

    def error(matrix: Tensor) -> float:
        assert factor is not None
        return float(((solved - matrix) @ factor).norm())

    own = error(product(problem.truncated(solved, ridge, rank)))
    left, values, right = torch.linalg.svd(solved)
    plain = error(left[:, :rank] * values[:rank] @ right[:rank])
    best = float(torch.linalg.svdvals(solved @ factor)[rank:].norm())
    assert own == pytest.approx(best, rel=1e-4)
    assert plain > 1.001 * own


def product(correction: Correction | None) -> Tensor:
    assert correction is not None
    assert correction.left is not None
    assert correction.right is not None
    return correction.left.double() @ correction.right.double()


def test_the_whole_rank_is_the_whole_matrix() -> None:
    problem = CorrectionProblem(TERMS["two metrics"])
    solved = step_of(problem, 1e-2)
    found = product(problem.truncated(solved, 1e-2, 100))
    torch.testing.assert_close(found, solved, rtol=1e-4, atol=1e-5)


def test_inputs_without_energy_have_no_correction() -> None:
    nothing = Term(torch.zeros(IN, IN).double(), torch.zeros(OUT, IN).double())
    problem = CorrectionProblem([nothing])
    assert problem.factor(1e-2) is None
    assert problem.nearest(1e-2) is None


@pytest.mark.parametrize("limit", [0, 50])
def test_a_limit_of_iterations_is_said(
    limit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(correction_problem, "MAX_ITERATIONS", limit)
    tensors = [randn(OUT, IN, seed=20 + s) for s in range(MODELS)]
    domains = [
        (randn(40, IN, seed=s), randn(40, OUT, seed=s + 9), metric(s, as_rows=False))
        for s in range(MODELS)
    ]
    with caplog.at_level(logging.WARNING, logger="mergekit_dam"):
        (fitted,) = fit_linear(
            sources_of(tensors, correction="full"), None, evidence_of_domains(domains), axis=-1
        )
    said = fitted.report.correction
    assert said["outcome"] == "full"
    if limit:
        assert "stopped" not in said
        assert not caplog.messages
    else:
        assert "at their limit of 0 iterations" in said["stopped"]
        assert any(said["stopped"] in message for message in caplog.messages)
