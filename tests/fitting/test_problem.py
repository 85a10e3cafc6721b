"""Least squares in metrics, against the dense problem."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.problem import ColumnProblem, Term
from mergekit_dam.fitting.solver import solve_columns, solve_tensor
from tests.kit.fits import MODELS
from tests.kit.metrics import DOMAINS, IN, OUT, dense, metric_of, metrics_of
from tests.kit.tensors import randn


def problem_of(metrics: Sequence[Metric], tokens: int = 20) -> tuple[ColumnProblem, Any]:
    """A linear with one domain a metric, and the same as explicit least squares."""
    directions = randn(MODELS, OUT, IN).double()
    terms, rows, targets = [], [], []
    for index, metric in enumerate(metrics):
        x, y = randn(tokens, IN, seed=index + 1).double(), randn(tokens, OUT, seed=index + 50)
        weight = 0.5 + index
        terms.append(Term(weight * x.T @ x, weight * y.double().T @ x, metric))
        # |R e|^2 = e^T S e with S = R^T R, for the upper triangular R of Cholesky.
        root = torch.linalg.cholesky(dense(metric)).T
        effect = torch.einsum("np,uop->noup", x, directions)
        rows.append(weight**0.5 * torch.einsum("ro,noup->nrup", root, effect).flatten(2))
        targets.append(weight**0.5 * y.double() @ root.T)
    design = torch.cat([r.flatten(0, 1) for r in rows])
    return ColumnProblem(directions, terms), (design, torch.cat([t.flatten() for t in targets]))


def dense_solve(least_squares: Any, ridge: float, *, tied: bool = False) -> Tensor:
    """By torch's own least squares, the ridge as extra rows."""
    design, target = least_squares
    if tied:
        design = design.unflatten(1, (MODELS, IN)).sum(2)
    shift = ridge * design.square().sum(0).mean()
    rows = shift.sqrt() * torch.eye(design.shape[1], dtype=torch.float64)
    design, target = torch.cat([design, rows]), torch.cat([target, target.new_zeros(len(rows))])
    found: Tensor = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
    return found.reshape(MODELS, -1)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("domains", DOMAINS)
@pytest.mark.parametrize("limit", [0, 1000])
def test_columns_in_metrics_are_the_dense_solve(domains: str, limit: int, ridge: float) -> None:
    problem, least_squares = problem_of(metrics_of(domains))
    solution = solve_columns(problem, ridge, dense_limit=limit)
    assert solution.method == ("cholesky" if limit else "conjugate gradients")
    expected = dense_solve(least_squares, ridge)
    torch.testing.assert_close(solution.step, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("domains", DOMAINS)
def test_one_unknown_a_tensor_in_metrics_is_the_dense_solve(domains: str) -> None:
    problem, least_squares = problem_of(metrics_of(domains))
    solution = solve_tensor(problem, 1e-2)
    expected = dense_solve(least_squares, 1e-2, tied=True)
    torch.testing.assert_close(solution.step, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("domains", DOMAINS)
def test_product_and_blocks_are_those_of_the_matrix(domains: str) -> None:
    problem, (design, target) = problem_of(metrics_of(domains))
    matrix = problem.matrix(torch.float64)
    torch.testing.assert_close(matrix, design.T @ design, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        problem.right_hand_side().flatten(), design.T @ target, rtol=1e-6, atol=1e-6
    )
    vector = randn(MODELS, IN).double()
    torch.testing.assert_close(problem.product(vector).flatten(), matrix @ vector.flatten())
    blocks = matrix.reshape(MODELS, IN, MODELS, IN).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    torch.testing.assert_close(problem.column_blocks(), blocks)


@pytest.mark.parametrize("limit", [0, 1000])
def test_one_metric_for_all_is_not_the_plain_fit_and_the_identity_is(limit: int) -> None:
    tokens = 20
    plain = solve_columns(problem_of([PLAIN] * 2)[0], 1e-2, dense_limit=limit).step
    # Orthogonal gradients of one size: S is a multiple of I, damping and all.
    alike = Metric.of_gradients(torch.eye(OUT))
    same = solve_columns(problem_of([alike] * 2)[0], 1e-2, dense_limit=limit).step
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-6)
    other = problem_of([metric_of("as a matrix")] * 2, tokens)[0]
    assert (solve_columns(other, 1e-2).step - plain).abs().max() > 1e-2


def test_one_term_a_domain_is_the_fit_of_their_sum() -> None:
    """Where all are measured plainly, they may as well be added up beforehand."""
    problem, _ = problem_of([PLAIN] * 3)
    gram = sum((term.gram for term in problem.terms), torch.zeros(IN, IN))
    cross = sum((term.residual for term in problem.terms), torch.zeros(OUT, IN))
    pooled = ColumnProblem(problem.directions, [Term(gram, cross)])
    for solve in (solve_columns, solve_tensor):
        apart = solve(problem, 1e-2).step
        torch.testing.assert_close(apart, solve(pooled, 1e-2).step)
