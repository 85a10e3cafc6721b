"""Metrics of errors, and fits in them, against everything done token by token."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.tensors import TensorSettings, TensorSources
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.moments import InputMoments, LinearMoments, LinearTokens
from mergekit_dam.fitting.problem import ColumnProblem, Term
from mergekit_dam.fitting.solver import solve_columns, solve_tensor

CPU = torch.device("cpu")
OUT, IN, MODELS = 6, 7, 3
TOKENS = {"as a matrix": 40, "as gradients": 4}
"""Of the gradients: more than outputs, or fewer."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def metric_of(kind: str, seed: int = 0, out: int = OUT) -> Metric:
    """A metric that is far from the plain one."""
    gradients = randn(TOKENS[kind], out, seed=100 + seed) * torch.linspace(0.1, 3, out)
    return Metric.of_gradients(gradients)


def dense(metric: Metric, out: int = OUT) -> Tensor:
    """S itself."""
    return metric(torch.eye(out, dtype=torch.float64))


@pytest.mark.parametrize("kind", TOKENS)
def test_a_metric_is_the_covariance_of_gradients_damped(kind: str) -> None:
    """Of gradients of one size: none of them is cut."""
    gradients = torch.nn.functional.normalize(randn(TOKENS[kind], OUT)) * 3
    metric = Metric.of_gradients(gradients)
    covariance = gradients.double().T @ gradients.double() / TOKENS[kind]
    damping = dense(metric) - covariance
    torch.testing.assert_close(
        damping, metric.shift * torch.eye(OUT, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert 0 < metric.shift < 10 * float(covariance.diagonal().mean())
    torch.testing.assert_close(dense(metric), dense(metric).T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", TOKENS)
def test_a_metric_follows_the_size_of_the_gradients(kind: str) -> None:
    gradients = randn(TOKENS[kind], OUT)
    plain = dense(Metric.of_gradients(gradients))
    scaled = dense(Metric.of_gradients(3 * gradients))
    torch.testing.assert_close(scaled, 9 * plain, rtol=1e-5, atol=1e-6)


def test_a_token_whose_gradient_explodes_does_not_take_a_metric_over() -> None:
    gradients = randn(40, OUT)
    before = dense(Metric.of_gradients(gradients))
    gradients[7] *= 1e5
    after = dense(Metric.of_gradients(gradients))
    assert float((after - before).norm()) < 0.5 * float(before.norm())


def test_gradients_of_nothing_measure_plainly() -> None:
    metric = Metric.of_gradients(torch.zeros(5, OUT))
    assert dense(metric).equal(torch.eye(OUT, dtype=torch.float64))


@pytest.mark.parametrize("kind", TOKENS)
def test_a_metric_measures_matrices_vectors_and_tokens_alike(kind: str) -> None:
    metric = metric_of(kind)
    full = dense(metric)
    vector, matrix = randn(OUT).double(), randn(OUT, IN).double()
    torch.testing.assert_close(metric(vector), full @ vector)
    torch.testing.assert_close(metric(matrix), full @ matrix)
    rows, weight = randn(30, OUT), torch.rand(30)
    direct = torch.einsum("t,ti,ij,tj->", weight.double(), rows.double(), full, rows.double())
    assert metric.square(rows, weight) == pytest.approx(float(direct), rel=1e-5)


def test_the_plain_metric_changes_nothing() -> None:
    matrix, rows, weight = randn(OUT, IN).double(), randn(30, OUT), torch.rand(30)
    assert PLAIN(matrix).equal(matrix)
    assert PLAIN.square(rows, weight) == pytest.approx(float((weight @ rows.square()).sum()))


@pytest.mark.parametrize("chunks", [(30,), (7, 23)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", TOKENS)
def test_an_error_in_the_metric_is_the_sum_over_tokens(
    kind: str, with_bias: bool, chunks: tuple[int, ...]
) -> None:
    metric = metric_of(kind)
    x, y, output = randn(30, IN), randn(30, OUT, seed=1), randn(30, OUT, seed=2)
    token_weight = torch.rand(30)
    sums = LinearMoments.zeros(OUT, InputMoments.zeros(IN, CPU), metric)
    tokens = LinearTokens(metric)
    parts = (t.split(chunks) for t in (x, y, output, token_weight))
    for xs, ys, outputs, w in zip(*parts, strict=True):
        sums.inputs.add(xs, w)
        sums.add(xs, ys, outputs, w)
        tokens.add(xs, ys, outputs, w)
    weight = randn(OUT, IN, seed=3).double()
    bias = randn(OUT, seed=4).double() if with_bias else None
    error = x.double() @ weight.T + (0 if bias is None else bias) - y.double()
    full = dense(metric)

    def size(rows: Tensor) -> float:
        rows = rows.double()
        return float(torch.einsum("t,ti,ij,tj->", token_weight.double(), rows, full, rows))

    for found in (sums, tokens):
        assert found.error(weight, bias) == pytest.approx(size(error), rel=1e-5)
        assert found.energy == pytest.approx(size(output), rel=1e-5)


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


DOMAINS: dict[str, list[str | None]] = {
    "matrices": ["as a matrix", "as a matrix"],
    "gradients": ["as gradients", "as gradients"],
    "one of each and a plain one": ["as a matrix", "as gradients", None],
}


def metrics_of(domains: str) -> list[Metric]:
    return [
        PLAIN if kind is None else metric_of(kind, seed)
        for seed, kind in enumerate(DOMAINS[domains])
    ]


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


FORM = Parametrisation.create([1.0] * MODELS, base=None, include_base=False, sum_to_one=False)


def sources(tensors: Sequence[Tensor], ridge: float, granularity: str) -> TensorSources:
    settings = TensorSettings(FORM, (1.0,) * MODELS, ridge, granularity, True, True, True)
    return TensorSources("weight", tensors, settings, torch.float32)


def evidence_of(
    domains: Sequence[tuple[Tensor, Tensor, Metric]],
) -> Evidence[LinearMoments]:
    terms = []
    for x, y, metric in domains:
        own = LinearMoments.zeros(y.shape[1], InputMoments.zeros(x.shape[1], CPU), metric)
        own.inputs.add(x, torch.ones(len(x)))
        own.add(x, y, y, torch.ones(len(x)))
        own.scale = 1 / own.energy
        terms.append(own)
    return Evidence(terms, terms, float(len(domains)))


@pytest.mark.parametrize("granularity", ["column", "tensor"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_a_linear_and_its_bias_are_fitted_to_what_each_domain_feels(
    axis: int, granularity: str
) -> None:
    """Against the dense solve over all tokens: the weight next to the average of the biases,
    then the bias next to the merged weight."""
    tensors, biases = list(randn(MODELS, OUT, IN)), list(randn(MODELS, OUT, seed=3))
    metrics = metrics_of("one of each and a plain one")
    domains = [
        (randn(25, IN, seed=k) + 0.3, randn(25, OUT, seed=20 + k), metric)
        for k, metric in enumerate(metrics)
    ]
    stored = [t.T if axis == 0 else t for t in tensors]
    ridge = 1e-7
    weight, bias = fit_linear(
        sources(stored, ridge, granularity),
        sources(biases, 1e-7, granularity),
        evidence_of(domains),
        axis=axis,
    )
    assert (weight.report.outcome, bias.report.outcome) == ("fitted", "fitted")

    def felt(rows: Tensor, k: int) -> Tensor:
        """`[tokens, out, ...]` in coordinates in which the metric is the plain one, and as parts
        of the energy."""
        root = torch.linalg.cholesky(dense(metrics[k])).T
        energy = (domains[k][1].double() @ root.T).square().sum()
        seen: Tensor = torch.einsum("ro,no...->nr...", root, rows.double()) / energy.sqrt()
        return seen

    def solve(design: list[Tensor], target: list[Tensor]) -> Tensor:
        rows = torch.cat([felt(d, k).flatten(0, 1) for k, d in enumerate(design)])
        wanted = torch.cat([felt(t, k).flatten() for k, t in enumerate(target)])
        shift = ridge * rows.square().sum(0).mean()
        rows = torch.cat([rows, shift.sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)])
        wanted = torch.cat([wanted, shift.sqrt().expand(rows.shape[1]) / MODELS])
        found: Tensor = torch.linalg.lstsq(rows, wanted[:, None], driver="gelsd").solution
        return found.reshape(MODELS, -1)

    average = torch.stack(biases).mean(0)
    effects = [torch.einsum("np,uop->noup", x, torch.stack(tensors)) for x, _, _ in domains]
    if granularity == "tensor":
        effects = [effect.sum(3, keepdim=True) for effect in effects]
    expected = solve([e.flatten(2) for e in effects], [y - average for _, y, _ in domains])
    torch.testing.assert_close(weight.coefficients.double(), expected, rtol=1e-3, atol=1e-3)

    merged = merge_weights(tensors, weight.coefficients)
    repeated = torch.stack(biases).T.expand(25, -1, -1)
    expected = solve([repeated] * 3, [y - x @ merged.T for x, y, _ in domains])
    torch.testing.assert_close(bias.coefficients.double(), expected, rtol=1e-3, atol=1e-3)

    direct = sum(
        float(felt(x @ merged.T + bias.merged - y, k).square().sum())
        for k, (x, y, _) in enumerate(domains)
    )
    assert bias.report.loss_fitted == pytest.approx(direct / 3, rel=1e-4)


def test_in_the_plain_metric_the_fit_is_the_plain_fit() -> None:
    tensors = list(randn(MODELS, OUT, IN))
    x, y = randn(25, IN, seed=1), randn(25, OUT, seed=2)
    source = sources(tensors, 1e-2, "column")
    (plain,) = fit_linear(source, None, evidence_of([(x, y, PLAIN)]), axis=-1)
    (same,) = fit_linear(source, None, evidence_of([(x, y, Metric())]), axis=-1)
    assert same.merged.equal(plain.merged)
    alike = Metric.of_gradients(torch.eye(OUT))
    (near,) = fit_linear(source, None, evidence_of([(x, y, alike)]), axis=-1)
    torch.testing.assert_close(near.merged, plain.merged, rtol=1e-5, atol=1e-5)
    assert near.report.loss_fitted == pytest.approx(plain.report.loss_fitted, rel=1e-5)


def test_an_output_that_nothing_feels_is_not_fitted() -> None:
    """Of two outputs that ask for different coefficients, the one that the loss feels decides."""
    tensors, x = list(randn(MODELS, 2, IN)), randn(50, IN, seed=1)
    asked = randn(2, MODELS, IN, seed=2)
    y = torch.stack([x @ merge_weights(tensors, asked[k])[k] for k in range(2)], 1)
    source = sources(tensors, 1e-7, "column")
    for feels in range(2):
        gradients = torch.full((50, 2), 1e-4)
        gradients[:, feels] = randn(50)
        metric = Metric.of_gradients(gradients)
        (fitted,) = fit_linear(source, None, evidence_of([(x, y, metric)]), axis=-1)
        error = (x @ fitted.merged.T - y).square().sum(0) / y.square().sum(0)
        (plain,) = fit_linear(source, None, evidence_of([(x, y, PLAIN)]), axis=-1)
        plainly = (x @ plain.merged.T - y).square().sum(0) / y.square().sum(0)
        assert error[feels] <= plainly[feels] + 1e-6
