"""The fit of norms on made-up data whose answer is known."""

import pytest
import torch

from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.fitting.norm import fit_norm
from tests.kit.fits import FORMS, MODELS, feature_evidence, sources_of, truth
from tests.kit.tensors import randn


@pytest.mark.parametrize("form", FORMS)
def test_norm_weights_are_recovered_and_coefficients_stay_near_the_start(form: str) -> None:
    """A feature's value is one equation for N coefficients: the nearest solution to the start."""
    tensors = [1 + 0.3 * t for t in randn(MODELS, 10)]
    form_, wanted = FORMS[form], 1 + 0.3 * randn(10, seed=9)
    n = randn(100, 10, seed=1)
    weight = sources_of(tensors, form=form)
    (fitted,) = fit_norm(weight, None, feature_evidence(n, n * wanted))
    torch.testing.assert_close(fitted.merged, wanted, rtol=0, atol=1e-3)
    directions = form_.directions(tensors)
    gap = wanted.double() - form_.average(tensors)
    nearest = form_.start[:, None] + directions * gap / directions.square().sum(0)
    torch.testing.assert_close(fitted.coefficients, form_.coefficients(nearest), rtol=0, atol=2e-2)


def test_a_norm_with_one_coefficient_a_model_is_the_least_squares_of_all_features() -> None:
    tensors = [1 + 0.3 * t for t in randn(MODELS, 10)]
    n, y = randn(100, 10, seed=1), randn(100, 10, seed=2)
    weight = sources_of(tensors, form="free", granularity="tensor")
    (fitted,) = fit_norm(weight, None, feature_evidence(n, y))
    design = (n[None] * torch.stack(tensors)[:, None]).flatten(1).T.double()
    expected = torch.linalg.lstsq(design, y.double().flatten()[:, None], driver="gelsd").solution
    torch.testing.assert_close(fitted.coefficients.double(), expected, rtol=0, atol=1e-5)


def test_a_norm_and_its_bias_are_both_fitted() -> None:
    tensors, biases = [1 + 0.3 * t for t in randn(MODELS, 10)], list(randn(MODELS, 10, seed=3))
    n = randn(100, 10, seed=1)
    n -= n.mean(0)
    wanted, known = 1 + 0.3 * randn(10, seed=9), truth("affine", 1)
    y = n * wanted + merge_weights(biases, known)
    fitted, bias = fit_norm(sources_of(tensors), sources_of(biases), feature_evidence(n, y))
    torch.testing.assert_close(fitted.merged, wanted, rtol=0, atol=1e-3)
    torch.testing.assert_close(bias.coefficients, known, rtol=0, atol=1e-3)
