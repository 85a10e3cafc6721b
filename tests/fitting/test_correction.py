"""The correction of a linear, against the dense solution of its quadratic."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting import correction_problem, low_rank
from mergekit_dam.fitting.correction_problem import CorrectionProblem, Minimiser
from mergekit_dam.fitting.low_rank import best_factors, nearest_product
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.moments import InputMoments, LinearMoments
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
    "gradients": [term(2, metric(3, as_rows=True), 1.5)],
}
SEVERAL = [term(0, metric(1, as_rows=False), 0.5), term(2, metric(3, as_rows=True), 1.5)]
"""Two domains, each with a metric of its own."""


def problem_of(terms: list[Term]) -> CorrectionProblem:
    """The problem whose residuals are those of the terms, at a weight of their own."""
    weight, bias = randn(OUT, IN, seed=7).double(), randn(OUT, seed=8).double()
    moments = []
    for own in terms:
        x_sum = randn(IN, seed=9).double()
        cross = own.residual + weight @ own.gram + torch.outer(bias, x_sum)
        sums = LinearMoments.zeros(OUT, InputMoments(own.gram, x_sum), own.metric)
        moments.append(replace(sums, cross=cross, scale=own.scale))
    return CorrectionProblem(moments, weight, bias, torch.float64)


def size_of(terms: list[Term]) -> float:
    """Mean diagonal of the quadratic."""
    return sum(
        own.scale * float(matrix_of(own.metric).diagonal().mean() * own.gram.diagonal().mean())
        for own in terms
    )


def minimiser(problem: CorrectionProblem, ridge: float) -> Minimiser:
    found = problem.minimiser(ridge)
    assert found is not None
    return found


@pytest.mark.parametrize("ridge", [1e-1, 1e-3, 1e-5])
def test_in_the_plain_metric_a_correction_is_the_dense_minimiser(ridge: float) -> None:
    problem, mean = problem_of(TERMS["plain"]), size_of(TERMS["plain"])
    assert problem.mean == pytest.approx(mean, rel=1e-6)
    found = minimiser(problem, ridge).matrix
    torch.testing.assert_close(found, dense(TERMS["plain"], ridge * mean), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", TERMS)
def test_a_single_term_has_the_dense_minimiser_without_a_ridge(kind: str) -> None:
    """With one, it shrinks the inputs of a Kronecker product, and not its outputs."""
    found = minimiser(problem_of(TERMS[kind]), 1e-12).matrix
    torch.testing.assert_close(found, dense(TERMS[kind], 0), rtol=1e-5, atol=1e-6)


def test_several_metrics_are_pooled_by_their_means() -> None:
    problem, ridge, mean = problem_of(SEVERAL), 1e-3, size_of(SEVERAL)
    assert problem.mean == pytest.approx(mean, rel=1e-6)
    plain = [
        replace(own, metric=PLAIN, scale=own.scale * float(matrix_of(own.metric).diagonal().mean()))
        for own in SEVERAL
    ]
    expected = dense(plain, ridge * mean)
    torch.testing.assert_close(minimiser(problem, ridge).matrix, expected, rtol=1e-5, atol=1e-6)


def gain(terms: list[Term], shift: float, step: Tensor) -> float:
    """How far the quadratic falls from zero to a step."""
    total = -shift * step.square().sum()
    for own in terms:
        s = matrix_of(own.metric)
        slope = 2 * s @ own.residual - s @ step @ own.gram
        total += own.scale * (slope * step).sum()
    return float(total)


def test_refinements_go_from_there_to_the_minimum() -> None:
    problem, shift = problem_of(SEVERAL), 1e-3 * size_of(SEVERAL)
    most = gain(SEVERAL, shift, dense(SEVERAL, shift))
    start = minimiser(problem, 1e-3)
    steps = (start.matrix, problem.refined(start, 1e-3))
    before, after = (gain(SEVERAL, shift, step) / most for step in steps)
    assert before < after <= 1
    assert 1 - after < 0.5 * (1 - before)


def test_enough_refinements_find_the_dense_minimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction_problem, "REFINEMENTS", 200)
    problem, ridge = problem_of(SEVERAL), 1e-3
    found = problem.refined(minimiser(problem, ridge), ridge)
    expected = dense(SEVERAL, ridge * size_of(SEVERAL))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)])
def test_a_domain_without_gradients_is_measured_plainly(places: tuple[int, ...]) -> None:
    terms = [replace(own, metric=PLAIN) if i in places else own for i, own in enumerate(SEVERAL)]
    problem, shift = problem_of(terms), 1e-3 * size_of(terms)
    start = minimiser(problem, 1e-3)
    found = problem.refined(start, 1e-3)
    if problem.plain:
        torch.testing.assert_close(found, dense(terms, shift), rtol=1e-6, atol=1e-8)
    assert (found - dense(terms, shift)).norm() < 0.5 * dense(terms, shift).norm()
    left, right = best_factors(problem, start, 1e-3, OUT)
    assert gain(terms, shift, left @ right) > 0.9 * gain(terms, shift, dense(terms, shift))


def test_the_plain_metric_needs_no_refinement() -> None:
    problem = problem_of(TERMS["plain"])
    found = minimiser(problem, 1e-3)
    assert problem.refined(found, 1e-3).equal(found.matrix)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_low_rank_is_the_best_in_the_metric_of_the_inputs(rank: int) -> None:
    """By Eckart and Young, of whitened matrices; the plain SVD is not."""
    problem = problem_of(TERMS["plain"])
    found = minimiser(problem, 1e-4)
    solved, factor = found.matrix, found.factor

    def error(matrix: Tensor) -> float:
        return float(((solved - matrix) @ factor).norm())

    made, rows = best_factors(problem, found, 1e-4, rank)
    own = error(made @ rows)
    left, values, right = torch.linalg.svd(solved)
    plain = error(left[:, :rank] * values[:rank] @ right[:rank])
    best = float(torch.linalg.svdvals(solved @ factor)[rank:].norm())
    assert own == pytest.approx(best, rel=1e-4)
    assert plain > 1.001 * own


def alternated(terms: list[Term], shift: float, left: Tensor, right: Tensor) -> Tensor:
    """The product that exact alternation ends at; every factor by a dense system."""
    for _ in range(300):
        rank = len(right)
        rows = [replace(t, gram=right @ t.gram @ right.T) for t in terms]
        system = shift * torch.kron(torch.eye(OUT).double(), right @ right.T)
        rhs = torch.zeros(OUT, rank).double()
        for own in rows:
            s = matrix_of(own.metric)
            system += own.scale * torch.kron(s, own.gram)
            rhs += own.scale * s @ own.residual @ right.T
        left = torch.linalg.solve(system, rhs.flatten()).reshape(OUT, rank)
        system = shift * torch.kron(left.T @ left, torch.eye(IN).double())
        rhs = torch.zeros(rank, IN).double()
        for own in terms:
            s = matrix_of(own.metric)
            system += own.scale * torch.kron(left.T @ s @ left, own.gram)
            rhs += own.scale * left.T @ s @ own.residual
        right = torch.linalg.solve(system, rhs.flatten()).reshape(rank, IN)
    return left @ right


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_low_rank_in_metrics_is_nearly_the_best_there(rank: int) -> None:
    """Better than the one that is the best for the inputs alone."""
    problem, ridge = problem_of(SEVERAL), 1e-3
    shift = ridge * size_of(SEVERAL)
    found = minimiser(problem, ridge)
    own = gain(SEVERAL, shift, torch.mm(*best_factors(problem, found, ridge, rank)))
    left, whitened = nearest_product(found.whitened, rank)
    for_inputs = left @ found.turned_back(whitened)
    best = alternated(SEVERAL, shift, left, found.turned_back(whitened))
    assert gain(SEVERAL, shift, for_inputs) < own
    assert own > 0.9 * gain(SEVERAL, shift, best)


@pytest.mark.parametrize("terms", [TERMS["plain"], SEVERAL], ids=["plain", "metrics"])
def test_the_whole_rank_is_the_whole_matrix(
    terms: list[Term], monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("LEFT", "RIGHT"):
        monkeypatch.setattr(low_rank, side, 200)
    problem, ridge = problem_of(terms), 1e-2
    made = torch.mm(*best_factors(problem, minimiser(problem, ridge), ridge, 100))
    expected = dense(terms, ridge * size_of(terms))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_a_low_rank_of_a_wide_matrix_is_nearly_the_best() -> None:
    """Singular values that fall slowly are the hardest for subspace iteration."""
    left, right = torch.linalg.qr(randn(60, 60, seed=0)).Q, torch.linalg.qr(randn(90, 60, seed=1)).Q
    matrix = left * torch.arange(1.0, 61).rsqrt() @ right.T
    for rank in (4, 16):
        made, rows = nearest_product(matrix, rank)
        best = float(torch.linalg.svdvals(matrix)[rank:].norm())
        assert best <= float((matrix - made @ rows).norm()) * (1 + 1e-5) < 1.001 * best
        again = nearest_product(matrix, rank)
        assert torch.equal(made, again[0])
        assert torch.equal(rows, again[1])


def test_inputs_without_energy_have_no_correction() -> None:
    nothing = Term(torch.zeros(IN, IN).double(), torch.zeros(OUT, IN).double())
    assert problem_of([nothing]).minimiser(1e-2) is None
