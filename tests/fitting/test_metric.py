"""Metrics of errors, against the same computed from all gradients."""

import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.moments import InputMoments, LinearMoments, LinearTokens
from tests.kit.metrics import IN, OUT, TOKENS, dense, metric_of
from tests.kit.tensors import CPU, randn


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


@pytest.mark.parametrize("times", [1e5, 1e25], ids=["much", "so that fp32 has no square of it"])
def test_a_token_whose_gradient_explodes_does_not_take_a_metric_over(times: float) -> None:
    gradients = randn(40, OUT)
    before = dense(Metric.of_gradients(gradients))
    gradients[7] *= times
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
