"""The fit of linears on made-up data whose answer is known."""

import time

import pytest
import torch

from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.errors import DamError
from mergekit_dam.fitting.evidence import Losses
from mergekit_dam.fitting.judged import judged
from mergekit_dam.fitting.linear import Residual, fit_bias, fit_linear
from tests.kit.fits import FORMS, MODELS, linear_evidence, sources_of, truth
from tests.kit.tensors import randn


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("granularity", ["column", "tensor"])
@pytest.mark.parametrize("form", FORMS)
def test_a_linear_made_by_known_coefficients_is_recovered(
    form: str, granularity: str, axis: int
) -> None:
    tensors = list(randn(MODELS, 12, 6))
    known = truth(form, 6 if granularity == "column" else 1)
    x = randn(200, 6, seed=1)
    y = x @ merge_weights(tensors, known).T
    stored = [tensor.T if axis == 0 else tensor for tensor in tensors]
    weight = sources_of(stored, form=form, granularity=granularity)
    (fitted,) = fit_linear(weight, None, linear_evidence(x, y), axis=axis)
    torch.testing.assert_close(fitted.coefficients, known, rtol=0, atol=2e-3)
    assert fitted.report.outcome == "fitted"
    assert fitted.report.loss_fitted is not None
    assert fitted.report.loss_fitted < 1e-6
    assert fitted.axis == axis


def test_a_linear_and_its_bias_are_both_recovered() -> None:
    """With inputs of mean zero, weight and bias do not interfere."""
    tensors, biases = list(randn(MODELS, 12, 6)), list(randn(MODELS, 12, seed=3))
    known, known_bias = truth("affine", 6), truth("affine", 1)
    x = randn(200, 6, seed=1)
    x -= x.mean(0)
    y = x @ merge_weights(tensors, known).T + merge_weights(biases, known_bias)
    fitted, bias = fit_linear(
        sources_of(tensors), sources_of(biases), linear_evidence(x, y), axis=-1
    )
    torch.testing.assert_close(fitted.coefficients, known, rtol=0, atol=2e-3)
    torch.testing.assert_close(bias.coefficients, known_bias, rtol=0, atol=2e-3)
    assert bias.coefficients.shape == (MODELS, 1)
    assert bias.report.loss_fitted is not None
    assert bias.report.loss_fitted < 1e-6


def test_a_bias_is_fitted_to_what_the_merged_weight_leaves_over() -> None:
    """One scalar a model, against torch's least squares on the residual of every token."""
    tensors, biases = list(randn(MODELS, 12, 6)), list(randn(MODELS, 12, seed=3))
    x, y = randn(50, 6, seed=1) + 0.5, randn(50, 12, seed=2)
    evidence = linear_evidence(x, y)
    source = sources_of(biases, form="free")
    fitted, bias = fit_linear(sources_of(tensors, ridge=0.1), source, evidence, axis=-1)
    residual = (y - x @ fitted.merged.T).double().flatten()
    design = torch.stack(biases).double().repeat(1, 50).T
    expected = torch.linalg.lstsq(design, residual[:, None], driver="gelsd").solution
    torch.testing.assert_close(bias.coefficients.double(), expected, rtol=0, atol=1e-4)


def test_fit_bias_judges_with_the_weight_it_is_given() -> None:
    biases = list(randn(MODELS, 12, seed=3))
    x, y = randn(50, 6, seed=1), randn(50, 12, seed=2)
    evidence, weight = linear_evidence(x, y), randn(12, 6, seed=5)
    (sums,) = evidence.fit
    residual = Residual(sums.y_sum - weight.double() @ sums.inputs.x_sum, sums.count)
    bias = fit_bias(sources_of(biases), [residual], weight, evidence)
    direct = (x @ weight.T + bias.merged - y).square().sum() / y.square().sum()
    assert bias.report.loss_fitted == pytest.approx(float(direct), rel=1e-5)
    at_start = (x @ weight.T + torch.stack(biases).mean(0) - y).square().sum() / y.square().sum()
    assert bias.report.loss_start == pytest.approx(float(at_start), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fit_and_its_judgement_are_of_the_written_weights(dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in randn(MODELS, 12, 6)]
    x, y = randn(80, 6, seed=1), randn(80, 12, seed=2)
    weight = sources_of(tensors, dtype=dtype, ridge=1e-2)
    (fitted,) = fit_linear(weight, None, linear_evidence(x, y), axis=-1)
    assert fitted.merged.dtype == dtype
    assert fitted.merged.equal(merge_weights(tensors, fitted.coefficients).to(dtype))
    written = (x.double() @ fitted.merged.double().T - y).square().sum() / y.double().square().sum()
    assert fitted.report.held_out_fitted == pytest.approx(float(written), rel=1e-5)
    # Of the data of the fit, the loss is that before rounding.
    assert fitted.report.loss_fitted == pytest.approx(float(written), rel=1e-2)


def test_a_fit_that_held_out_data_likes_less_is_dropped_for_the_start() -> None:
    """Held-out targets that the average meets exactly: whatever was learnt elsewhere is worse."""
    tensors = list(randn(MODELS, 12, 6))
    average = torch.stack(tensors).mean(0)
    x, y = randn(80, 6, seed=1), randn(80, 12, seed=2)
    held_out = (x, x @ average.T)
    weight = sources_of(tensors)
    (fitted,) = fit_linear(weight, None, linear_evidence(x, y, held_out), axis=-1)
    report = fitted.report
    assert report.outcome == "start kept: held-out loss was not better"
    assert fitted.coefficients.equal(weight.start())
    assert fitted.merged.equal(weight.merged(weight.start()))
    assert report.loss_start is not None
    assert report.loss_fitted is not None
    assert report.held_out_start is not None
    assert report.held_out_fitted is not None
    assert report.loss_fitted < report.loss_start
    assert report.held_out_fitted > report.held_out_start
    assert report.held_out_start < 1e-6


def test_a_fit_is_judged_on_held_out_data_alone() -> None:
    """Kept although its loss on the data of the fit is worse than the start's."""
    candidate, weight = truth("affine", 6), sources_of(list(randn(MODELS, 12, 6)))
    started = time.perf_counter()
    for after, kept in ((0.9, True), (1.0, False), (float("nan"), False)):
        fitted = judged(
            weight,
            "linear",
            candidate,
            axis=-1,
            before=Losses(0.1, 1.0),
            after=Losses(0.5, after),
            solver={},
            started=started,
        )
        assert fitted.coefficients.equal(candidate if kept else weight.start())


def test_a_start_without_a_finite_loss_is_an_error_that_names_the_tensor() -> None:
    tensors = list(randn(MODELS, 12, 6))
    with pytest.raises(DamError, match=r"block\.weight: required a finite loss"):
        judged(
            sources_of(tensors),
            "linear",
            truth("affine", 6),
            axis=-1,
            before=Losses(float("nan"), float("nan")),
            after=Losses(1.0, 1.0),
            solver={},
            started=0.0,
        )


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1e-1, 1e2])
def test_the_loss_on_the_data_of_the_fit_never_rises(ridge: float) -> None:
    tensors, biases = list(randn(MODELS, 12, 6)), list(randn(MODELS, 12, seed=3))
    x, y = randn(80, 6, seed=1) + 1, randn(80, 12, seed=2)
    weight, bias = sources_of(tensors, ridge=ridge), sources_of(biases, ridge=ridge)
    for fitted in fit_linear(weight, bias, linear_evidence(x, y), axis=-1):
        assert fitted.report.loss_start is not None
        assert fitted.report.loss_fitted is not None
        assert fitted.report.loss_fitted <= fitted.report.loss_start
