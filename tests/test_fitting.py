"""The fit of every kind of tensor on made-up data whose answer is known."""

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.tensors import TensorSettings, TensorSources
from mergekit_dam.errors import DamError
from mergekit_dam.fitting import embedding as embedding_module
from mergekit_dam.fitting.embedding import Usage, fit_embedding
from mergekit_dam.fitting.evidence import Evidence, Losses
from mergekit_dam.fitting.features import FeatureMoments
from mergekit_dam.fitting.judged import judged
from mergekit_dam.fitting.linear import Residual, fit_bias, fit_linear
from mergekit_dam.fitting.moments import InputMoments, LinearMoments
from mergekit_dam.fitting.norm import fit_norm
from mergekit_dam.layers.targets import before_norm, token_weights
from tests.objective.made import run_settings

CPU = torch.device("cpu")
MODELS = 3
TINY = 1e-9

FORMS = {
    "affine": Parametrisation.create(
        [1.0] * MODELS, base=None, include_base=False, sum_to_one=True
    ),
    "task vectors": Parametrisation.create(
        [1.0] * MODELS, base=1, include_base=False, sum_to_one=True
    ),
    "free": Parametrisation.create([1.0] * MODELS, base=None, include_base=False, sum_to_one=False),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sources_of(
    tensors: Sequence[Tensor],
    *,
    form: str = "affine",
    ridge: float = TINY,
    granularity: str = "column",
    loss_weights: Sequence[float] = (1.0,) * MODELS,
    dtype: torch.dtype = torch.float32,
) -> TensorSources:
    settings = TensorSettings(
        parametrisation=FORMS[form],
        loss_weights=tuple(loss_weights),
        ridge=ridge,
        granularity=granularity,
        embeddings=True,
        norms=True,
        head=True,
    )
    return TensorSources("block.weight", tensors, settings, dtype)


def truth(form: str, columns: int) -> Tensor:
    """Coefficients that the form can reach, other than its start."""
    unknowns = randn(len(FORMS[form].start), columns, seed=7).double()
    return FORMS[form].coefficients(FORMS[form].start[:, None] + 0.5 * unknowns)


def linear_evidence(
    x: Tensor, y: Tensor, held_out: tuple[Tensor, Tensor] | None = None
) -> Evidence[LinearMoments]:
    """Evidence of one model's data, weighted as `gather` weights it."""

    def moments(x: Tensor, y: Tensor) -> LinearMoments:
        own = LinearMoments.zeros(y.shape[1], InputMoments.zeros(x.shape[1], CPU))
        own.inputs.add(x, torch.ones(x.shape[0]))
        own.add(x, y, y, torch.ones(x.shape[0]))
        return own.scaled(1 / own.energy)

    fit = moments(x, y)
    return Evidence([fit], [fit if held_out is None else moments(*held_out)], 1.0)


def feature_evidence(n: Tensor, y: Tensor) -> Evidence[FeatureMoments]:
    own = FeatureMoments.zeros(n.shape[1], CPU)
    own.add(n, y, y, torch.ones(n.shape[0]))
    scaled = own.scaled(1 / own.energy)
    return Evidence([scaled], [scaled], 1.0)


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
def test_what_was_fitted_and_judged_is_what_is_written(dtype: torch.dtype) -> None:
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


def usage(source: int, rows: Sequence[int], size: int = 20) -> Usage:
    counts = torch.bincount(torch.tensor(rows), minlength=size).double()
    return Usage(source, counts, counts)


def test_rows_that_one_models_data_uses_give_that_models_embedding() -> None:
    tensors = list(randn(MODELS, 20, 6))
    fitted = fit_embedding(sources_of(tensors), [usage(2, [1, 1, 5, 7, 8, 9, 11])])
    expected = torch.tensor([[0.0], [0.0], [1.0]]).expand(-1, 6)
    torch.testing.assert_close(fitted.coefficients, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(fitted.merged, tensors[2], rtol=0, atol=1e-2)
    assert fitted.report.loss_fitted is not None
    assert fitted.report.loss_fitted < 1e-6


@pytest.mark.parametrize("rows_at_a_time", [4096, 3])
def test_an_embedding_is_the_weighted_least_squares_of_every_dimension(
    rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_module, "ROWS", rows_at_a_time)
    tensors = list(randn(MODELS, 20, 6))
    used = {0: [0, 1, 2, 2, 2, 3, 9], 2: [2, 10, 11, 12, 12, 13, 14, 15]}
    loss_weights = (1.0, 1.0, 3.0)
    source = sources_of(tensors, form="free", loss_weights=loss_weights)
    fitted = fit_embedding(source, [usage(k, rows) for k, rows in used.items()])
    for dimension in range(6):
        design, target = [], []
        for k, rows in used.items():
            factor = (loss_weights[k] / tensors[k][rows].square().sum()).sqrt()
            design.append(factor * torch.stack([t[rows, dimension] for t in tensors], 1))
            target.append(factor * tensors[k][rows, dimension])
        expected = torch.linalg.lstsq(
            torch.cat(design).double(), torch.cat(target).double()[:, None], driver="gelsd"
        ).solution
        found = fitted.coefficients[:, dimension, None].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_embeddings_losses_are_fractions_of_the_rows_energy() -> None:
    tensors = list(randn(MODELS, 20, 6))
    used = {0: [0, 1, 2, 2, 2, 3], 2: [2, 10, 11, 12, 12]}
    source = sources_of(tensors, loss_weights=(1.0, 1.0, 3.0), ridge=1e-2)
    held = torch.zeros(20, dtype=torch.float64)
    held[[4, 5]] = 1
    uses = [Usage(k, usage(k, rows).fit, held) for k, rows in used.items()]
    fitted = fit_embedding(source, uses)
    assert fitted.report.outcome == "fitted"
    for rows_of, reported in (
        (used, fitted.report.loss_fitted),
        ({0: [4, 5], 2: [4, 5]}, fitted.report.held_out_fitted),
    ):
        direct = 0.0
        for k, weight in ((0, 1.0), (2, 3.0)):
            rows = rows_of[k]
            error = (fitted.merged[rows] - tensors[k][rows]).square().sum()
            direct += weight / 4 * float(error / tensors[k][rows].square().sum())
        assert reported == pytest.approx(direct, rel=1e-5)


def test_an_embedding_with_one_coefficient_a_model_ties_its_dimensions() -> None:
    tensors = list(randn(MODELS, 20, 6))
    source = sources_of(tensors, form="free", granularity="tensor")
    rows = [0, 1, 2, 2, 3]
    fitted = fit_embedding(source, [usage(0, rows)])
    assert fitted.coefficients.shape == (MODELS, 1)
    torch.testing.assert_close(
        fitted.coefficients[:, 0], torch.tensor([1.0, 0.0, 0.0]), atol=1e-4, rtol=0
    )


def test_tokens_up_to_the_median_energy_count_in_full_and_others_inversely() -> None:
    energies = torch.tensor([[1.0, 4.0, 2.0, 8.0, 0.0], [3.0, 3.0, 3.0, 3.0, 300.0]])
    targets = torch.zeros(2, 5, 4)
    targets[:, :, 1] = energies.sqrt()
    expected = torch.tensor([1, 1 / 2, 1, 1 / 4, 1, 1, 1, 1, 1, 1 / 100])
    torch.testing.assert_close(token_weights([targets], 2), expected)
    torch.testing.assert_close(token_weights([targets.flatten(0, 1)], 2), expected)


def test_token_weights_do_not_depend_on_size_or_chunks_and_average_over_units() -> None:
    a, b = randn(4, 7, 5), randn(4, 7, 9, seed=1)
    whole = token_weights([a, b], 4)
    torch.testing.assert_close(token_weights([1e3 * a, 1e-3 * b], 4), whole)
    parts = [token_weights([a[i : i + 2], b[i : i + 2]], 2) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)
    energy = [
        x.square().sum(-1) / x.square().sum(-1).median(1, keepdim=True).values for x in (a, b)
    ]
    expected = 1 / ((energy[0] + energy[1]) / 2).clamp_min(1).flatten()
    torch.testing.assert_close(whole, expected)
    assert whole.min() > 0
    assert whole.max() == 1


def test_targets_of_no_energy_leave_all_tokens_equal() -> None:
    assert token_weights([torch.zeros(2, 3, 4)], 2).equal(torch.ones(6))


@pytest.mark.parametrize("small", [False, True])
def test_the_target_before_a_norm_gives_what_is_wanted_after_it(small: bool) -> None:
    """Where a norm's output can be reached at all, that is, of root mean square 1 before gain."""
    gain = 1 + 0.2 * randn(16)
    if small:
        gain[3] = 1e-6  # cannot be steered through: keeps the teacher's
    output = randn(5, 16, seed=1)
    direction = output + 0.3 * randn(5, 16, seed=2)
    direction[:, 3] = output[:, 3]
    wanted = gain * rms_norm(direction, (16,))
    target = before_norm(output, wanted, gain)
    reached = gain * rms_norm(target, (16,))
    if small:
        assert target[:, 3].equal(output[:, 3])
        torch.testing.assert_close(reached, wanted, rtol=0, atol=0.1)
    else:
        torch.testing.assert_close(reached, wanted, rtol=0, atol=1e-5)


def test_the_target_before_a_norm_is_the_teachers_output_where_nothing_is_missing() -> None:
    gain, output = 1 + 0.2 * randn(16), randn(5, 16, seed=1)
    wanted = gain * rms_norm(output, (16,))
    torch.testing.assert_close(before_norm(output, wanted, gain), output)


def test_a_target_that_would_turn_the_output_around_is_given_up() -> None:
    gain, output = torch.ones(16), randn(5, 16, seed=1)
    assert before_norm(output, -output, gain).equal(output)


@pytest.mark.parametrize(
    ("holdout", "sequences", "expected"),
    [(0.125, 32, 4), (0.125, 2, 1), (0.125, 1, 0), (0.0, 32, 0), (0.9, 4, 3), (0.99, 3, 2)],
)
def test_at_least_one_sequence_is_held_out_and_one_is_left(
    holdout: float, sequences: int, expected: int
) -> None:
    assert run_settings(holdout).held_out(sequences) == expected
