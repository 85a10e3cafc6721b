"""The fit of the head lowers the divergence of the distributions, and so does its correction."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import out_by_in
from mergekit_dam.coefficients.tensors import FittedTensor
from mergekit_dam.layers import head as head_module
from mergekit_dam.layers.head import fit_head
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.part import output_part
from tests.kit.settings import tensor_settings
from tests.kit.tensors import LENGTH, kl, randn
from tests.kit.walks import walk_of


def kl_with(head: Tensor, walk: Walk, temperature: float) -> float:
    """KL divergence of the merged model from the teacher, in nats per token, with a head."""
    stream = walk.streams[0]
    with torch.no_grad():
        teacher = walk.part.run(walk.teacher_weights(stream), stream.teacher[:]) / temperature
        merged = walk.part.run({**walk.weights, "lm_head.weight": head}, stream.merged[:])
        return kl(teacher, merged / temperature)


@torch.no_grad()
def fitted_head(walk: Walk, temperature: float = 1.0) -> FittedTensor:
    unit = next(unit for unit in walk.anatomy.units if unit.name == "lm_head")
    ((name, fitted),) = fit_head(walk, unit, temperature=temperature)
    assert name == "lm_head.weight"
    return fitted


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("granularity", ["column", "tensor"])
@pytest.mark.parametrize("name", ["llama", "granite", "phi"])
def test_the_heads_fit_lowers_the_kl(name: str, granularity: str, temperature: float) -> None:
    x = randn(6, LENGTH, 16)
    walk, _ = walk_of(name, output_part, x, 0.0, granularity=granularity)
    fitted = fitted_head(walk, temperature)
    report = fitted.report
    assert report.outcome == "fitted"
    start = walk.weights["lm_head.weight"]
    assert report.held_out_start == pytest.approx(kl_with(start, walk, temperature), rel=1e-4)
    assert report.held_out_fitted == pytest.approx(
        kl_with(fitted.merged, walk, temperature), rel=1e-4
    )
    assert kl_with(fitted.merged, walk, temperature) < 0.9 * kl_with(start, walk, temperature)


@pytest.mark.parametrize("rate", [3e-2, 30.0])
def test_a_head_that_can_only_get_worse_keeps_its_start(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged part starts as the teacher's, at a KL of zero."""
    monkeypatch.setattr(head_module, "LEARNING_RATE", rate)
    walk, _ = walk_of("llama", output_part, randn(6, LENGTH, 16), 0.0)
    norm, head = walk.sources["model.norm.weight"], walk.sources["lm_head.weight"]
    teacher = head.tensors[1]
    walk.sources = {
        "model.norm.weight": replace(norm, tensors=[norm.tensors[1]] * 2),
        # Three sources, of which the second is the average.
        "lm_head.weight": replace(
            head,
            tensors=[head.tensors[0], teacher, 2 * teacher - head.tensors[0]],
            settings=tensor_settings(3),
        ),
    }
    walk.weights = {n: s.merged(s.start()) for n, s in walk.sources.items()}
    fitted = fitted_head(walk)
    assert fitted.report.held_out_start == pytest.approx(0, abs=1e-6)
    assert fitted.report.outcome.startswith("start kept")
    assert fitted.coefficients.equal(torch.full((3, 1), 1 / 3))


class TestCorrection:
    @pytest.mark.parametrize("name", ["llama", "granite", "phi"])
    def test_it_lowers_the_kl_below_that_of_the_columns(self, name: str) -> None:
        x = randn(6, LENGTH, 16)
        walk, _ = walk_of(name, output_part, x, 0.0)
        columns = fitted_head(walk).report.held_out_fitted
        walk, _ = walk_of(name, output_part, x, 0.0, correction="low_rank", correction_rank=4)
        fitted = fitted_head(walk)
        said = fitted.report.correction
        assert said["outcome"] == "low rank"
        assert said["rank"] == 4
        assert said["held_out"] < 0.8 * columns  # type: ignore[operator]
        assert said["held_out"] == pytest.approx(kl_with(fitted.merged, walk, 1.0), rel=1e-4)

    def test_what_is_judged_is_what_coefficients_and_factors_make(self) -> None:
        walk, _ = walk_of(
            "llama",
            output_part,
            randn(6, LENGTH, 16),
            0.0,
            correction="low_rank",
            correction_rank=3,
        )
        fitted = fitted_head(walk)
        correction = fitted.correction
        assert correction is not None
        assert correction.left is not None
        assert correction.right is not None
        without = fitted.sources.merged(fitted.coefficients, axis=fitted.axis)
        added = out_by_in(fitted.merged, fitted.axis) - out_by_in(without, fitted.axis)
        torch.testing.assert_close(added, correction.left @ correction.right)
        assert torch.linalg.matrix_rank(added, rtol=1e-4) == 3

    def test_a_whole_one_is_kept_where_it_is_asked_for_or_smaller(self) -> None:
        for settings in ({"correction": "full"}, {"correction": "low_rank", "correction_rank": 64}):
            walk, _ = walk_of("llama", output_part, randn(6, LENGTH, 16), 0.0, **settings)
            fitted = fitted_head(walk)
            assert fitted.correction is not None
            assert list(fitted.correction.tensors) == ["full"]

    def test_a_head_that_all_models_share_is_corrected_for_what_enters_it(self) -> None:
        x, drift = randn(6, LENGTH, 16), 0.5 * randn(16)
        walk, _ = walk_of("llama", output_part, x, drift, correction="low_rank", correction_rank=4)
        head = walk.sources["lm_head.weight"]
        shared = replace(head, tensors=[head.tensors[0]] * 2)
        walk.sources = {**walk.sources, "lm_head.weight": shared}
        walk.weights = {n: s.merged(s.start()) for n, s in walk.sources.items()}
        walk.head = "lm_head"
        unit = next(unit for unit in walk.anatomy.units if unit.name == "lm_head")
        assert walk.fittable(unit, "head")
        fitted = fitted_head(walk)
        assert fitted.coefficients.equal(torch.full((2, 1), 0.5))
        assert fitted.report.correction["held_out"] < 0.9 * fitted.report.held_out_start  # type: ignore[operator]

    def test_it_is_dropped_where_it_can_only_do_harm(self) -> None:
        walk, _ = walk_of("llama", output_part, randn(6, LENGTH, 16), 0.0, correction="low_rank")
        sources = {n: replace(s, tensors=[s.tensors[1]] * 2) for n, s in walk.sources.items()}
        walk.sources = sources
        walk.weights = {n: s.merged(s.start()) for n, s in walk.sources.items()}
        fitted = fitted_head(walk)
        assert fitted.correction is None
        assert fitted.report.correction["outcome"].startswith("dropped")
        assert fitted.merged.equal(walk.weights["lm_head.weight"])

    def test_two_fits_have_the_same_bytes(self) -> None:
        made = [
            fitted_head(
                walk_of("llama", output_part, randn(6, LENGTH, 16), 0.0, correction="full")[0]
            )
            for _ in range(2)
        ]
        assert made[0].merged.equal(made[1].merged)
