"""The solvers against dense least squares, against gradient descent, and against each other."""

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting.problem import ColumnProblem, Term
from mergekit_dam.fitting.solver import (
    FP64_LIMIT,
    precision,
    solve_columns,
    solve_small,
    solve_tensor,
)
from tests.kit.least_squares import Layer, make_layer


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Threads may add in another order each time."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_columns_agree_with_dense_least_squares(domains: int, tokens: int, ridge: float) -> None:
    """With few tokens, fewer than columns, the ridge alone decides among solutions."""
    layer = make_layer(domains=domains, tokens=tokens)
    solution = solve_columns(layer.problem, ridge)
    assert solution.method == "cholesky"
    assert solution.residual < 1e-9
    # In directions without data, a residual of that size moves the solution by it over the ridge.
    torch.testing.assert_close(solution.step, layer.dense(ridge), rtol=1e-5, atol=1e-9 / ridge)


def test_columns_agree_with_a_long_gradient_descent() -> None:
    layer, ridge = make_layer(tokens=40), 0.3
    unknowns = torch.zeros(3, 7, dtype=torch.float64).requires_grad_()
    # The curvature is at most twice the largest eigenvalue of the normal matrix and its ridge.
    shift = layer.shift(ridge)
    rate = 1 / (2 * torch.linalg.eigvalsh(layer.problem.matrix(torch.float64))[-1] + 2 * shift)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(layer.loss(unknowns, shift), unknowns)
        unknowns = (unknowns - rate * gradient).detach().requires_grad_()
    solution = solve_columns(layer.problem, ridge)
    torch.testing.assert_close(solution.step, unknowns.detach(), rtol=1e-6, atol=1e-6)


def test_the_gradient_is_zero_at_the_solution() -> None:
    layer, ridge = make_layer(models=2, tokens=30), 1e-3
    unknowns = solve_columns(layer.problem, ridge).step.requires_grad_()
    loss = layer.loss(unknowns, layer.shift(ridge))
    (gradient,) = torch.autograd.grad(loss, unknowns)
    assert gradient.abs().max() < 1e-10 * loss


@pytest.mark.parametrize("domains", [1, 4])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_conjugate_gradients_agree_with_cholesky(domains: int, ridge: float) -> None:
    layer = make_layer(models=4, out=24, columns=40, tokens=60, domains=domains)
    exact = solve_columns(layer.problem, ridge)
    found = solve_columns(layer.problem, ridge, dense_limit=0)
    assert found.method == "conjugate gradients"
    assert 0 < found.iterations < 1000
    assert found.residual < 1e-8
    torch.testing.assert_close(found.step, exact.step, rtol=1e-7, atol=1e-7)


def test_a_single_model_and_a_single_column_are_solved() -> None:
    layer = make_layer(models=1, columns=1)
    for limit in (0, 100):
        solution = solve_columns(layer.problem, 1e-3, dense_limit=limit)
        torch.testing.assert_close(solution.step, layer.dense(1e-3))


def test_the_product_without_a_matrix_is_the_matrix_product() -> None:
    problem = make_layer(domains=3).problem
    matrix = problem.matrix(torch.float64)
    vector = torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(
        problem.product(vector).flatten(), matrix @ vector.flatten(), rtol=1e-12, atol=1e-12
    )
    blocks = matrix.reshape(3, 7, 3, 7).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    torch.testing.assert_close(problem.column_blocks(), blocks, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)


def test_the_matrix_and_right_hand_side_are_those_of_the_design() -> None:
    layer = make_layer(domains=2)
    design, target = layer.design()
    torch.testing.assert_close(layer.problem.matrix(torch.float64), design.T @ design)
    torch.testing.assert_close(layer.problem.right_hand_side().flatten(), design.T @ target)


@pytest.mark.parametrize("domains", [1, 3])
def test_one_unknown_a_tensor_is_the_dense_solve_with_tied_columns(domains: int) -> None:
    layer = make_layer(domains=domains)
    solution = solve_tensor(layer.problem, 1e-2)
    assert solution.step.shape == (3, 1)
    torch.testing.assert_close(solution.step, layer.dense(1e-2, tied=True))


def test_small_systems_are_solved_with_one_common_ridge() -> None:
    roots = torch.randn(6, 4, 3, dtype=torch.float64)
    matrix, rhs = roots.mT @ roots, torch.randn(6, 3, dtype=torch.float64)
    solution = solve_small(matrix, rhs, 0.1)
    shift = 0.1 * torch.stack([m.trace() / 3 for m in matrix]).mean()
    for n in range(6):
        expected = torch.linalg.solve(matrix[n] + shift * torch.eye(3, dtype=torch.float64), rhs[n])
        torch.testing.assert_close(solution.step[:, n], expected)


def test_a_small_system_without_data_of_its_own_stays_at_the_start() -> None:
    """A feature that the calibration text never excites has a zero matrix."""
    matrix, rhs = torch.zeros(2, 2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    matrix[0], rhs[0] = torch.eye(2), torch.ones(2)
    assert solve_small(matrix, rhs, 1e-2).step[:, 1].tolist() == [0, 0]


@pytest.mark.parametrize("solve", ["cholesky", "conjugate gradients", "tensor"])
def test_an_infinite_ridge_gives_the_start(solve: str) -> None:
    layer = make_layer()
    if solve == "tensor":
        step = solve_tensor(layer.problem, 1e12).step
    else:
        limit = 0 if solve == "conjugate gradients" else 100
        step = solve_columns(layer.problem, 1e12, dense_limit=limit).step
    assert step.abs().max() < 1e-10


@pytest.mark.parametrize("ridge", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("limit", [0, 100])
def test_a_singular_problem_is_solved_at_tiny_ridge(ridge: float, limit: int) -> None:
    """The affine form's directions sum to zero, so its matrix is singular before the ridge."""
    layer = make_layer(tokens=40)
    centred = Layer(layer.directions - layer.directions.mean(0), layer.domains)
    solution = solve_columns(centred.problem, ridge, dense_limit=limit)
    assert solution.step.isfinite().all()
    assert solution.step.sum(0).abs().max() < 1e-3
    design, target = centred.design()
    best = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
    least = (design @ best - target[:, None]).square().sum()
    found = (design @ solution.step.flatten() - target).square().sum()
    assert found <= least * (1 + 1e-4)


@pytest.mark.parametrize("limit", [0, 100])
def test_identical_models_leave_nothing_to_fit(limit: int) -> None:
    layer = make_layer()
    problem = ColumnProblem(layer.directions * 0, layer.problem.terms)
    for solution in (
        solve_columns(problem, 1e-2, dense_limit=limit),
        solve_tensor(problem, 1e-2),
    ):
        assert solution.method == "none"
        assert not solution.step.any()


@pytest.mark.parametrize("limit", [0, 100])
def test_a_start_that_is_already_the_minimum_stays_and_says_so(limit: int) -> None:
    """Nothing is left to explain: the relative residual of the solution is 0, not 0 / 0."""
    layer = make_layer()
    terms = [Term(t.gram, t.residual * 0) for t in layer.problem.terms]
    solution = solve_columns(ColumnProblem(layer.directions, terms), 1e-2, dense_limit=limit)
    assert not solution.step.any()
    assert solution.residual == 0


@pytest.mark.parametrize("limit", [0, 10_000])
@pytest.mark.usefixtures("two_threads")
def test_the_same_problem_gives_the_same_bytes_every_time(limit: int) -> None:
    """fp32 least squares on the CPU does not: 5 answers in 200 calls were seen."""
    layer = make_layer(models=3, out=23, columns=40, tokens=70)
    problem = layer.problem
    answers = {
        solve_columns(problem, 1e-3, dense_limit=limit).step.numpy().tobytes() for _ in range(20)
    }
    assert len(answers) == 1


@pytest.mark.parametrize("solve", ["cholesky", "conjugate gradients", "tensor"])
def test_the_gain_is_the_loss_at_the_start_less_that_at_the_solution(solve: str) -> None:
    layer = make_layer(domains=2, tokens=40)
    if solve == "tensor":
        solution = solve_tensor(layer.problem, 0.1)
    else:
        limit = 100 if solve == "cholesky" else 0
        solution = solve_columns(layer.problem, 0.1, dense_limit=limit)
    none = torch.zeros((), dtype=torch.float64)
    start = layer.loss(torch.zeros(3, 7, dtype=torch.float64), none)
    assert solution.gain == pytest.approx(float(start - layer.loss(solution.step, none)), rel=1e-9)


def test_a_scale_weights_a_term() -> None:
    layer = make_layer(domains=2)
    terms = [Term(w * x.T @ x, w * y.T @ x) for w, x, y in layer.domains]
    apart = [Term(x.T @ x, y.T @ x, scale=w) for w, x, y in layer.domains]
    for limit in (0, 100):
        found, expected = (
            solve_columns(ColumnProblem(layer.directions, own), 1e-3, dense_limit=limit).step
            for own in (apart, terms)
        )
        torch.testing.assert_close(found, expected)


def test_products_in_fp32_are_enough_for_conjugate_gradients() -> None:
    layer = make_layer(models=4, out=24, columns=40, tokens=60)
    exact = solve_columns(layer.problem, 1e-2).step
    terms = [Term(t.gram.float(), t.residual.float()) for t in layer.problem.terms]
    problem = ColumnProblem(layer.directions.float(), terms)
    found = solve_columns(problem, 1e-2, dense_limit=0)
    assert (found.method, found.step.dtype) == ("conjugate gradients", torch.float64)
    torch.testing.assert_close(found.step, exact, rtol=1e-3, atol=1e-4)


def test_a_factor_in_fp32_leaves_conjugate_gradients_next_to_nothing_to_do() -> None:
    layer = make_layer(models=4, out=24, columns=40, tokens=60)
    for problem, accuracy, iterations in (
        (layer.problem, 1e-9, 4),
        (ColumnProblem(layer.directions.float(), layer.problem.terms), 1e-3, 1),
    ):
        terms = [Term(t.gram.to(problem.directions), t.residual) for t in problem.terms]
        solution = solve_columns(ColumnProblem(problem.directions, terms), 1e-2)
        assert solution.method == "cholesky"
        assert 0 < solution.iterations <= iterations
        assert solution.residual < accuracy


def test_a_matrix_that_is_singular_in_fp32_is_factorised_in_fp64() -> None:
    """Two directions that differ in the ninth digit, and hardly any ridge."""
    layer = make_layer(models=2, tokens=40)
    directions = torch.stack([layer.directions[0], layer.directions[0] * (1 + 1e-9)])
    asked: list[torch.dtype] = []
    whole = ColumnProblem.matrix

    def matrix(problem: ColumnProblem, dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return whole(problem, dtype)

    with mock.patch.object(ColumnProblem, "matrix", matrix):
        solution = solve_columns(ColumnProblem(directions, layer.problem.terms), 1e-10)
    assert asked == [torch.float32, torch.float64]
    assert solution.residual < 1e-9


@pytest.mark.parametrize("limit", [0, 100])
def test_data_that_is_not_finite_has_no_solution(limit: int) -> None:
    layer = make_layer()
    terms = [Term(t.gram * math.nan, t.residual) for t in layer.problem.terms]
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        solve_columns(ColumnProblem(layer.directions, terms), 1e-2, dense_limit=limit)


def test_sums_are_fp64_up_to_a_size() -> None:
    assert precision(FP64_LIMIT) == torch.float64
    assert precision(FP64_LIMIT + 1) == torch.float32
