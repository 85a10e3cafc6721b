"""The solvers against dense least squares, against gradient descent, and against each other."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting.solver import (
    ColumnProblem,
    Term,
    solve_columns,
    solve_small,
    solve_tensor,
)


@dataclass(frozen=True)
class Layer:
    """A made-up linear: directions fp64 `[U, out, in]`, and data of each domain.

    Attributes:
        domains: (weight, inputs `[tokens, in]`, targets less the origin's output
            `[tokens, out]`) of every domain.
    """

    directions: Tensor
    domains: list[tuple[float, Tensor, Tensor]]
    start: Tensor

    @property
    def problem(self) -> ColumnProblem:
        terms = [Term(w * x.T @ x, w * y.T @ x) for w, x, y in self.domains]
        return ColumnProblem(self.directions, terms)

    def design(self) -> tuple[Tensor, Tensor]:
        """Explicit least squares: the output as a matrix times the unknowns, and the target.

        Column (u, p) of the matrix is what `d[u, p] = 1` adds to all outputs: the outer
        product of input column p with column p of direction u.
        """
        rows, targets = [], []
        for weight, x, y in self.domains:
            columns = torch.einsum("np,uop->noup", x, self.directions)
            rows.append(weight**0.5 * columns.flatten(2).flatten(0, 1))
            targets.append(weight**0.5 * y.flatten())
        return torch.cat(rows), torch.cat(targets)

    def dense(self, ridge: float, *, tied: bool = False) -> Tensor:
        """The minimiser by torch's own least squares, the ridge as extra rows.

        Args:
            tied: all columns of a direction share one unknown.
        """
        design, target = self.design()
        count, _, columns = self.directions.shape
        anchor = self.start[:, None].expand(-1, columns).flatten()
        if tied:
            design = design.unflatten(1, (count, columns)).sum(2)
            anchor = self.start
        shift = ridge * design.square().sum(0).mean()
        design = torch.cat([design, shift.sqrt() * torch.eye(len(anchor), dtype=torch.float64)])
        target = torch.cat([target, shift.sqrt() * anchor])
        solution: Tensor = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
        return solution.reshape(count, -1)

    def loss(self, unknowns: Tensor, shift: Tensor) -> Tensor:
        """The regularised objective, straight from data."""
        weight = (self.directions * unknowns[:, None, :]).sum(0)
        loss: Tensor = shift * (unknowns - self.start[:, None]).square().sum()
        for domain_weight, x, y in self.domains:
            loss = loss + domain_weight * (x @ weight.T - y).square().sum()
        return loss

    def shift(self, ridge: float) -> Tensor:
        """The absolute ridge."""
        return ridge * self.design()[0].square().sum(0).mean()


def make_layer(
    *,
    models: int = 3,
    out: int = 5,
    columns: int = 7,
    domains: int = 2,
    tokens: int = 9,
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Layer(
        directions=randn(models, out, columns),
        domains=[(0.5 + k, randn(tokens, columns), randn(tokens, out)) for k in range(domains)],
        start=torch.full((models,), 1 / models, dtype=torch.float64),
    )


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
    solution = solve_columns(layer.problem, layer.start, ridge)
    assert solution.method == "cholesky"
    torch.testing.assert_close(solution.unknowns, layer.dense(ridge), rtol=1e-8, atol=1e-9)


def test_columns_agree_with_a_long_gradient_descent() -> None:
    layer, ridge = make_layer(tokens=40), 0.3
    unknowns = layer.start[:, None].repeat(1, 7).requires_grad_()
    # The curvature is at most twice the largest eigenvalue of the normal matrix and its ridge.
    shift = layer.shift(ridge)
    rate = 1 / (2 * torch.linalg.eigvalsh(layer.problem.matrix())[-1] + 2 * shift)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(layer.loss(unknowns, shift), unknowns)
        unknowns = (unknowns - rate * gradient).detach().requires_grad_()
    solution = solve_columns(layer.problem, layer.start, ridge)
    torch.testing.assert_close(solution.unknowns, unknowns.detach(), rtol=1e-6, atol=1e-6)


def test_the_gradient_is_zero_at_the_solution() -> None:
    layer, ridge = make_layer(models=2, tokens=30), 1e-3
    unknowns = solve_columns(layer.problem, layer.start, ridge).unknowns.requires_grad_()
    loss = layer.loss(unknowns, layer.shift(ridge))
    (gradient,) = torch.autograd.grad(loss, unknowns)
    assert gradient.abs().max() < 1e-10 * loss


@pytest.mark.parametrize("domains", [1, 4])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_conjugate_gradients_agree_with_cholesky(domains: int, ridge: float) -> None:
    layer = make_layer(models=4, out=24, columns=40, tokens=60, domains=domains)
    exact = solve_columns(layer.problem, layer.start, ridge)
    found = solve_columns(layer.problem, layer.start, ridge, dense_limit=0)
    assert found.method == "conjugate gradients"
    assert 0 < found.iterations < 1000
    assert found.residual < 1e-8
    torch.testing.assert_close(found.unknowns, exact.unknowns, rtol=1e-7, atol=1e-7)


def test_a_single_model_and_a_single_column_are_solved() -> None:
    layer = make_layer(models=1, columns=1)
    for limit in (0, 100):
        solution = solve_columns(layer.problem, layer.start, 1e-3, dense_limit=limit)
        torch.testing.assert_close(solution.unknowns, layer.dense(1e-3))


def test_the_product_without_a_matrix_is_the_matrix_product() -> None:
    problem = make_layer(domains=3).problem
    matrix = problem.matrix()
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
    torch.testing.assert_close(layer.problem.matrix(), design.T @ design)
    torch.testing.assert_close(layer.problem.right_hand_side().flatten(), design.T @ target)


@pytest.mark.parametrize("domains", [1, 3])
def test_one_unknown_a_tensor_is_the_dense_solve_with_tied_columns(domains: int) -> None:
    layer = make_layer(domains=domains)
    solution = solve_tensor(layer.problem, layer.start, 1e-2)
    assert solution.unknowns.shape == (3, 1)
    torch.testing.assert_close(solution.unknowns, layer.dense(1e-2, tied=True))


def test_small_systems_are_solved_with_one_common_ridge() -> None:
    roots = torch.randn(6, 4, 3, dtype=torch.float64)
    matrix, rhs = roots.mT @ roots, torch.randn(6, 3, dtype=torch.float64)
    start = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    solution = solve_small(matrix, rhs, start, 0.1)
    shift = 0.1 * torch.stack([m.trace() / 3 for m in matrix]).mean()
    for n in range(6):
        expected = torch.linalg.solve(
            matrix[n] + shift * torch.eye(3, dtype=torch.float64), rhs[n] + shift * start
        )
        torch.testing.assert_close(solution.unknowns[:, n], expected)


def test_a_small_system_without_data_of_its_own_stays_at_the_start() -> None:
    """A feature that the calibration text never excites has a zero matrix."""
    matrix, rhs = torch.zeros(2, 2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    matrix[0], rhs[0] = torch.eye(2), torch.ones(2)
    start = torch.tensor([0.3, 0.7], dtype=torch.float64)
    assert solve_small(matrix, rhs, start, 1e-2).unknowns[:, 1].tolist() == [0.3, 0.7]


@pytest.mark.parametrize("solve", ["cholesky", "conjugate gradients", "tensor"])
def test_an_infinite_ridge_gives_the_start(solve: str) -> None:
    layer = make_layer()
    if solve == "tensor":
        unknowns = solve_tensor(layer.problem, layer.start, 1e12).unknowns
    else:
        limit = 0 if solve == "conjugate gradients" else 100
        unknowns = solve_columns(layer.problem, layer.start, 1e12, dense_limit=limit).unknowns
    expected = layer.start[:, None].expand_as(unknowns)
    torch.testing.assert_close(unknowns, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ridge", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("limit", [0, 100])
def test_a_singular_problem_is_solved_at_tiny_ridge(ridge: float, limit: int) -> None:
    """The affine form's directions sum to zero, so its matrix is singular before the ridge."""
    layer = make_layer(tokens=40)
    centred = Layer(layer.directions - layer.directions.mean(0), layer.domains, layer.start * 0)
    solution = solve_columns(centred.problem, centred.start, ridge, dense_limit=limit)
    assert solution.unknowns.isfinite().all()
    assert solution.unknowns.sum(0).abs().max() < 1e-3
    design, target = centred.design()
    best = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
    least = (design @ best - target[:, None]).square().sum()
    found = (design @ solution.unknowns.flatten() - target).square().sum()
    assert found <= least * (1 + 1e-4)


@pytest.mark.parametrize("limit", [0, 100])
def test_identical_models_leave_nothing_to_fit(limit: int) -> None:
    layer = make_layer()
    problem = ColumnProblem(layer.directions * 0, layer.problem.terms)
    for solution in (
        solve_columns(problem, layer.start, 1e-2, dense_limit=limit),
        solve_tensor(problem, layer.start, 1e-2),
    ):
        assert solution.method == "none"
        assert solution.unknowns.equal(layer.start[:, None].expand_as(solution.unknowns))


@pytest.mark.parametrize("limit", [0, 100])
def test_a_start_that_is_already_the_minimum_stays_and_says_so(limit: int) -> None:
    """No reaction at all: the relative residual of the solution is 0, not 0 / 0."""
    layer = make_layer()
    terms = [Term(t.gram, t.cross * 0) for t in layer.problem.terms]
    solution = solve_columns(
        ColumnProblem(layer.directions, terms), layer.start * 0, 1e-2, dense_limit=limit
    )
    assert not solution.unknowns.any()
    assert solution.residual == 0


@pytest.mark.parametrize("limit", [0, 10_000])
@pytest.mark.usefixtures("two_threads")
def test_the_same_problem_gives_the_same_bytes_every_time(limit: int) -> None:
    """fp32 least squares on the CPU does not: 5 answers in 200 calls were seen."""
    layer = make_layer(models=3, out=23, columns=40, tokens=70)
    problem = layer.problem
    answers = {
        solve_columns(problem, layer.start, 1e-3, dense_limit=limit).unknowns.numpy().tobytes()
        for _ in range(20)
    }
    assert len(answers) == 1
