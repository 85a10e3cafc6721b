"""Loss and gradients of whole models by autograd, all models in one graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.gradient import Batch, Objective
from mergekit_dam.streams.boundaries import BoundaryStates
from tests.kit.networks import Made
from tests.kit.settings import logits_settings


def plain_loss(
    merged: Tensor, teacher: Tensor, settings: RunParameters, weights: Tensor | None = None
) -> Tensor:
    """The loss of logits `[sequences, length, vocabulary]`, a weighted mean over their tokens."""
    t = settings.temperature
    q, p = log_softmax(merged / t, -1), log_softmax(teacher / t, -1)
    loss = t**2 * (p.exp() * (p - q)).sum(-1)
    loss = loss + settings.mse * (merged - teacher).square().mean(-1)
    loss = loss - settings.entropy * t**2 * (q.exp() * q).sum(-1)
    return (loss if weights is None else loss * weights).mean()


def plain(
    made: Made, point: MergeRecord, batches: Sequence[Batch], settings: RunParameters
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by the coefficients of every tensor, all models in one graph, fp64."""
    rows = {n: c.double().requires_grad_() for n, c in point.coefficients.items()}
    weights = made.differentiable(rows, point.axes)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        teacher = made.logits(made.weights[batch.source], batch.tokens)
        merged = made.logits(weights, batch.tokens)
        loss = loss + batch.weight * plain_loss(merged, teacher, settings, batch.weights)
    gradients = torch.autograd.grad(loss, list(rows.values()), allow_unused=True)
    return float(loss.detach()), {
        n: g for n, g in zip(rows, gradients, strict=True) if g is not None
    }


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-5 of the largest of each tensor, or of a twentieth of the largest of all."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        own = expected[name]
        assert gradient.shape == own.shape, name
        scale = max(float(own.abs().max()), 5e-2 * largest)
        assert float((gradient - own).abs().max()) <= 1e-5 * scale, name


def check_gradients(
    made: Made, folder: Path, batches: Sequence[Batch] | None = None, **terms: Any
) -> None:
    settings, point = logits_settings(**terms), made.point()
    batches = made.batches() if batches is None else batches
    coordinates = made.coordinates
    objective = Objective(made.network(), coordinates, settings, BoundaryStates(folder))
    loss, gradients = objective(point, batches)
    expected_loss, expected = plain(made, point, batches, settings)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == coordinates.keys()
    assert_equal_gradients(gradients, expected)
