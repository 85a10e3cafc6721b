"""The fit of the head lowers the divergence of the distributions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

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
