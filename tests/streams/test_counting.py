"""Weights of tokens in losses: equal for those that count, with a mean of 1 over every split."""

from dataclasses import replace

import pytest
import torch

from mergekit_dam.streams.counting import counted_tokens, token_weights
from mergekit_dam.streams.stream import Stream
from tests.kit.tensors import LENGTH, counted_of, tokens_of


@pytest.mark.parametrize("held_out", [0, 2])
def test_weighted_means_over_a_split_are_means_over_the_tokens_that_count(held_out: int) -> None:
    counted = counted_of(7)
    losses = torch.rand(7, LENGTH, dtype=torch.float64)
    weights = token_weights(counted, held_out)
    for rows in (slice(0, 7 - held_out), slice(7 - held_out, 7)):
        if len(losses[rows]):
            expected = losses[rows][counted[rows]].mean()
            torch.testing.assert_close((weights[rows] * losses[rows]).mean(), expected)
            total = 0.0
            for row in range(*rows.indices(7)):
                tokens, weight = counted_tokens(weights, row)
                total += weight * float(losses[row, tokens].mean()) if weight else 0.0
            assert total / len(losses[rows]) == pytest.approx(float(expected))


def test_without_a_mask_all_tokens_count_alike() -> None:
    assert counted_tokens(None, 3) == (slice(None), 1.0)


def test_parts_of_a_stream_have_the_weights_of_their_sequences() -> None:
    counted = counted_of(7)
    stream = Stream.of_tokens(0, tokens_of(0, 7), 2, counted=counted)
    whole = token_weights(counted, 2)
    for part, rows in [
        (stream, slice(None)),
        (stream.of("fit"), slice(5)),
        (stream.of("held_out"), slice(5, None)),
        (stream.of("fit").first(3), slice(3)),
    ]:
        assert part.weights is not None
        assert part.weights.equal(whole[rows])
    assert stream.number_counted("fit") == int(counted[:5].sum())
    assert stream.number_counted("held_out") == int(counted[5:].sum())
    assert replace(stream, weights=None).number_counted("held_out") == 2 * LENGTH


def test_held_out_tokens_alone_are_told_apart() -> None:
    counted = counted_of(7)
    stream = Stream.of_tokens(0, tokens_of(0, 7), 2, counted=counted)
    judging = stream.judging(slice(5, 7))
    assert judging is not None
    assert judging.equal(counted[5:].reshape(-1))
    assert stream.judging(slice(0, 5)) is None
    assert replace(stream, weights=None).judging(slice(5, 7)) is None
