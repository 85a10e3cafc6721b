"""Tokens that do not count have no influence on the verdict on a merged model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergekit_dam.search.judge import verdict_of
from mergekit_dam.streams.counting import token_weights
from mergekit_dam.streams.stream import Stream
from tests.kit.networks import Made, make
from tests.kit.tensors import counted_of, kl, randn

HELD_OUT = 3


def counting(made: Made, counted: Tensor, held_out: int = HELD_OUT) -> list[Stream]:
    weights = token_weights(counted, held_out)
    return [replace(own, weights=weights) for own in made.data(5, held_out)]


@pytest.mark.parametrize("held_out", [0, HELD_OUT])
def test_the_verdict_is_the_mean_over_the_tokens_that_count(held_out: int) -> None:
    made, counted = make(), counted_of(5)
    point = made.point()
    weights = made.differentiable(point.coefficients, point.axes)
    judging = slice(5 - held_out, None) if held_out else slice(None)
    expected = []
    for own in made.data():
        tokens, chosen = own.merged[judging], counted[judging]
        teacher = made.logits(made.weights[own.source], tokens)
        expected.append(kl(teacher[chosen], made.logits(weights, tokens)[chosen]))
    found = verdict_of(made.network(), point, counting(made, counted, held_out))
    assert found.losses == pytest.approx(expected, rel=1e-4)


def test_what_happens_at_other_tokens_does_not_matter() -> None:
    made, counted = make(), counted_of(5)
    data = counting(made, counted)
    disturbed = [
        replace(own, teacher=torch.where(counted[..., None], x, x + randn(*x.shape)))
        for own in data
        for x in [own.teacher[:]]
    ]
    network, point = made.network(), made.point()
    assert verdict_of(network, point, disturbed) == verdict_of(network, point, data)
    without = [replace(own, weights=None) for own in disturbed]
    assert verdict_of(network, point, without) != verdict_of(network, point, disturbed)
