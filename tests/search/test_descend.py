"""The descent of the end-to-end objective against a plain one with all models resident."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam.choices import Resident
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.errors import ConfigError
from mergekit_dam.journal import Journal
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search import descend as descend_module
from mergekit_dam.search.coordinates import coefficients_of, starting_unknowns
from mergekit_dam.search.descend import Descent, descend
from mergekit_dam.search.gradient import Objective
from mergekit_dam.search.judge import Verdict, verdict_of
from mergekit_dam.search.regularisers import column_weights
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.stream import Stream
from tests.kit.autograd import plain_loss
from tests.kit.descents import SEED, plain_descent, rate_of, steps_of
from tests.kit.networks import Made, make
from tests.kit.settings import logits_settings
from tests.kit.tensors import CPU

WORST = Verdict((math.inf,) * 2, (1.0,) * 2)


def run(
    made: Made,
    folder: Path,
    settings: RunParameters,
    *,
    start: MergeRecord | None = None,
    verdict: Verdict = WORST,
    data: Sequence[Stream] | None = None,
    resident: Resident = "auto",
    weights: Mapping[str, Tensor] | None = None,
    allowance: float = math.inf,
) -> Descent:
    objective = Objective(
        made.network(resident), made.coordinates, settings, BoundaryStates(folder)
    )
    return descend(
        objective,
        data or made.data(),
        start or made.average(),
        verdict,
        allowance=allowance,
        steps=steps_of(settings),
        column_weights=weights or {},
        seed=SEED,
        moving=folder / "moving",
        journal=Journal(folder, keeps=False),
        name="descent",
    )


@pytest.fixture
def ever_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that likes every look better than the one before: the last is the result."""
    count = itertools.count()
    monkeypatch.setattr(
        descend_module, "verdict_of", lambda *_: Verdict((1 / (1 + next(count)),) * 2, (1.0,) * 2)
    )


DESCENTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "mofo": {"optimizer": "mofo", "mofo_fraction": 0.4},
    "accumulated": {"gradient_accumulation": 2, "batch_size": 2, "steps": 5},
    "clipped": {"max_grad_norm": 0.05, "batch_size": 2},
    "warmed up, cosine": {"lr_schedule": "cosine", "warmup": 0.25},
    "linear": {"lr_schedule": "linear", "warmup": 0.1, "temperature": 2.0},
    "tanh": {"nonlinearity": "tanh"},
    "sigmoid": {"nonlinearity": "sigmoid"},
    "relu": {"nonlinearity": "relu"},
    "penalties": {"similarity": 0.1, "l1": 0.01, "l2": 0.02, "overlap": 0.03},
}


def check(
    made: Made,
    folder: Path,
    settings: RunParameters,
    *,
    weights: Mapping[str, Tensor] | None = None,
    start: MergeRecord | None = None,
) -> None:
    start = start or made.average()
    ended = run(made, folder, settings, weights=weights, start=start)
    expected, losses = plain_descent(made, settings, weights or {}, start)
    assert ended.losses == pytest.approx(losses, rel=1e-4)
    assert ended.steps == settings.steps
    for name, rows in expected.items():
        found = ended.record.coefficients[name]
        assert found.dtype == torch.float32
        assert found.shape == rows.shape
        # A step of Adam has the size of the rate, whatever that of the gradient: where the
        # latter is next to nothing, its rounding decides.
        apart = (found - rows).abs() / (rate_of(settings) * steps_of(settings))
        assert float(apart.mean()) < 1e-3, name
        assert float(apart.max()) < 0.05, name


@pytest.mark.usefixtures("ever_better")
@pytest.mark.parametrize("kind", DESCENTS)
def test_ten_steps_agree_with_a_plain_descent(kind: str, tmp_path: Path) -> None:
    free = "nonlinearity" in DESCENTS[kind]
    made = make("llama", base=not free, sum_to_one=not free)
    check(made, tmp_path, logits_settings(**DESCENTS[kind]))


@pytest.mark.usefixtures("ever_better")
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen2", "gemma2"])
def test_steps_agree_on_other_architectures(name: str, tmp_path: Path) -> None:
    check(make(name), tmp_path, logits_settings(steps=5))


@pytest.mark.usefixtures("ever_better")
def test_the_weighted_overlap_is_that_of_the_models_without_the_base(tmp_path: Path) -> None:
    made = make(base=True, models=3)
    weights = {
        name: column_weights([own[name] for own in made.weights[:-1]], made.weights[-1][name])
        for name, coordinate in made.coordinates.items()
        if coordinate.kind == "linear"
    }
    # Not from the average: where models' coefficients are equal, rounding decides on the smaller.
    settings = logits_settings(steps=5, weighted_overlap=0.1)
    check(made, tmp_path, settings, weights=weights, start=made.point(scale=0.05))
    free = run(made, tmp_path, logits_settings(steps=5)).record
    penalised = run(
        made, tmp_path, logits_settings(steps=5, weighted_overlap=100.0), weights=weights
    ).record
    name = next(iter(weights))
    assert not penalised.coefficients[name].equal(free.coefficients[name])


def test_the_best_of_the_start_and_all_judged_points_is_the_result(tmp_path: Path) -> None:
    made = make()
    data, start = made.data(32, held_out=12), made.average()
    network = made.network()
    verdict = verdict_of(network, start, data)
    settings = logits_settings(steps=4, batch_size=20, learning_rate=3e-3)
    ended = run(made, tmp_path, settings, verdict=verdict, data=data)
    assert 0 < ended.steps <= 4
    assert ended.verdict.mean < verdict.mean
    assert verdict_of(network, ended.record, data) == ended.verdict
    assert ended.record.reports.keys() == made.coordinates.keys()
    settings = logits_settings(learning_rate=1e3, steps=4)
    hopeless = run(made, tmp_path, settings, start=start, verdict=verdict, data=data)
    assert (hopeless.steps, hopeless.verdict) == (0, verdict)
    assert hopeless.record is start


def test_a_descent_that_loses_itself_in_nan_keeps_its_start(tmp_path: Path) -> None:
    made = make()
    verdict = verdict_of(made.network(), made.average(), made.data())
    ended = run(made, tmp_path, logits_settings(learning_rate=1e30, steps=3), verdict=verdict)
    assert ended.steps == 0
    assert ended.verdict == verdict


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_resident_or_not_the_descent_is_the_same(name: str, tmp_path: Path) -> None:
    made, settings = make(name), logits_settings(steps=3)
    always = run(made, tmp_path, settings, resident="always")
    never = run(made, tmp_path, settings, resident="never")
    assert always.losses == never.losses
    assert always.verdict == never.verdict
    for name, rows in always.record.coefficients.items():
        assert never.record.coefficients[name].equal(rows)


def test_a_descent_begins_at_the_given_coefficients(tmp_path: Path) -> None:
    """From any coefficients, of a column or of a tensor; others than the fitted stay."""
    made = make(base=True, norms=False)
    start = made.point()
    name = "model.layers.0.mlp.up_proj.weight"
    start.coefficients[name] = torch.tensor([[0.3], [0.5], [0.2]])
    ended = run(made, tmp_path, logits_settings(steps=1, learning_rate=1e-6), start=start)
    form = made.settings.parametrisation
    for name, rows in ended.record.coefficients.items():
        if name in made.coordinates:
            nearest = form.coefficients(form.unknowns(start.coefficients[name]))
            torch.testing.assert_close(rows, nearest.expand_as(rows), rtol=0, atol=1e-5)
        else:
            assert rows is start.coefficients[name]


def test_one_coefficient_a_tensor_can_start_from_one_a_column(tmp_path: Path) -> None:
    made, coarse = make(), make(granularity="tensor")
    ended = run(coarse, tmp_path, logits_settings(steps=1), start=made.point(scale=0.01))
    for name in coarse.coordinates:
        assert ended.record.coefficients[name].shape == (2, 1)


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "relu"])
def test_unknowns_lead_back_to_the_coefficients_they_were_made_of(nonlinearity: Any) -> None:
    made = make(sum_to_one=False)
    coordinates, start = list(made.coordinates.values()), made.average()
    unknowns = starting_unknowns(coordinates, start, nonlinearity, CPU)
    for name, rows in coefficients_of(coordinates, unknowns, nonlinearity).items():
        torch.testing.assert_close(rows, start.coefficients[name].expand_as(rows))
        assert unknowns[name].is_leaf
        assert unknowns[name].dtype == torch.float64


def test_a_start_that_the_nonlinearity_cannot_reach_is_refused(tmp_path: Path) -> None:
    made = make()  # the affine form starts at zero
    with pytest.raises(ConfigError, match="sigmoid can only give coefficients between 0 and 1"):
        run(made, tmp_path, logits_settings(nonlinearity="sigmoid"))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_the_verdict_is_the_kl_of_whole_models_on_held_out_sequences(name: str) -> None:
    made = make(name)
    point, data = made.point(scale=0.05), made.data(held_out=2)
    verdict = verdict_of(made.network(), point, data)
    rows = {n: c.double() for n, c in point.coefficients.items()}
    weights = made.differentiable(rows, point.axes)
    for own, loss in zip(data, verdict.losses, strict=True):
        tokens = own.merged[-2:]
        teacher = made.logits(made.weights[own.source], tokens)
        expected = plain_loss(made.logits(weights, tokens), teacher, logits_settings())
        assert loss == pytest.approx(float(expected), rel=1e-5)
    a, b = verdict.losses
    assert verdict.mean == pytest.approx((a + 1.5 * b) / 2.5)


@pytest.mark.parametrize(("allowance", "steps"), [(math.inf, 3), (0.1, 2)])
def test_a_point_that_one_model_pays_for_is_passed_over(
    allowance: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is judged by what that model had before the descent, not at the look before."""
    looks = iter([(0.8, 1.0), (0.7, 1.08), (0.5, 1.16)])
    monkeypatch.setattr(descend_module, "verdict_of", lambda *_: Verdict(next(looks), (1.0, 1.0)))
    before = Verdict((1.0, 1.0), (1.0, 1.0))
    settings = logits_settings(steps=3)
    assert run(make(), tmp_path, settings, verdict=before, allowance=allowance).steps == steps
