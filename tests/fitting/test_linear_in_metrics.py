"""The fit of a linear and its bias in metrics, against dense least squares."""

import pytest
import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.metric import PLAIN, Metric
from tests.kit.fits import MODELS, evidence_of_domains, sources_of
from tests.kit.metrics import IN, OUT, dense, metrics_of
from tests.kit.tensors import randn


@pytest.mark.parametrize("granularity", ["column", "tensor"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_a_linear_and_its_bias_are_fitted_in_the_metric_of_each_domain(
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
        sources_of(stored, form="free", ridge=ridge, granularity=granularity),
        sources_of(biases, form="free", ridge=1e-7, granularity=granularity),
        evidence_of_domains(domains),
        axis=axis,
    )
    assert (weight.report.outcome, bias.report.outcome) == ("fitted", "fitted")

    def in_plain_coordinates(rows: Tensor, k: int) -> Tensor:
        """`[tokens, out, ...]` in coordinates in which the metric is the plain one, and as parts
        of the energy."""
        root = torch.linalg.cholesky(dense(metrics[k])).T
        energy = (domains[k][1].double() @ root.T).square().sum()
        seen: Tensor = torch.einsum("ro,no...->nr...", root, rows.double()) / energy.sqrt()
        return seen

    def solve(design: list[Tensor], target: list[Tensor]) -> Tensor:
        rows = torch.cat([in_plain_coordinates(d, k).flatten(0, 1) for k, d in enumerate(design)])
        wanted = torch.cat([in_plain_coordinates(t, k).flatten() for k, t in enumerate(target)])
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
        float(in_plain_coordinates(x @ merged.T + bias.merged - y, k).square().sum())
        for k, (x, y, _) in enumerate(domains)
    )
    assert bias.report.loss_fitted == pytest.approx(direct / 3, rel=1e-4)


def test_in_the_plain_metric_the_fit_is_the_plain_fit() -> None:
    tensors = list(randn(MODELS, OUT, IN))
    x, y = randn(25, IN, seed=1), randn(25, OUT, seed=2)
    source = sources_of(tensors, form="free", ridge=1e-2)
    (plain,) = fit_linear(source, None, evidence_of_domains([(x, y, PLAIN)]), axis=-1)
    (same,) = fit_linear(source, None, evidence_of_domains([(x, y, Metric())]), axis=-1)
    assert same.merged.equal(plain.merged)
    alike = Metric.of_gradients(torch.eye(OUT))
    (near,) = fit_linear(source, None, evidence_of_domains([(x, y, alike)]), axis=-1)
    torch.testing.assert_close(near.merged, plain.merged, rtol=1e-5, atol=1e-5)
    assert near.report.loss_fitted == pytest.approx(plain.report.loss_fitted, rel=1e-5)


def test_an_output_without_gradients_is_not_fitted() -> None:
    """Of two outputs that ask for different coefficients, the one with large gradients decides."""
    tensors, x = list(randn(MODELS, 2, IN)), randn(50, IN, seed=1)
    asked = randn(2, MODELS, IN, seed=2)
    y = torch.stack([x @ merge_weights(tensors, asked[k])[k] for k in range(2)], 1)
    source = sources_of(tensors, form="free", ridge=1e-7)
    for sensitive in range(2):
        gradients = torch.full((50, 2), 1e-4)
        gradients[:, sensitive] = randn(50)
        metric = Metric.of_gradients(gradients)
        (fitted,) = fit_linear(source, None, evidence_of_domains([(x, y, metric)]), axis=-1)
        error = (x @ fitted.merged.T - y).square().sum(0) / y.square().sum(0)
        (plain,) = fit_linear(source, None, evidence_of_domains([(x, y, PLAIN)]), axis=-1)
        plainly = (x @ plain.merged.T - y).square().sum(0) / y.square().sum(0)
        assert error[sensitive] <= plainly[sensitive] + 1e-6
