"""Batches of the end-to-end objective, in one process and in several."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from mergekit_dam.search.batches import batches_of
from mergekit_dam.search.gradient import Batch
from mergekit_dam.search.judge import verdict_of
from mergekit_dam.streams.share import Share
from mergekit_dam.streams.stream import Stream
from tests.kit.networks import make
from tests.kit.processes import streams_of


def numbered(count: int, held_out: int, source: int = 0) -> Stream:
    """Data whose every sequence is its number."""
    tokens = torch.arange(count)[:, None].expand(-1, 3)
    share = Share.of_all(count, held_out)
    return Stream(source, tokens[..., None].float(), tokens, share)


WEIGHTS = (1.0, 2.0)
"""Loss weights of the sources."""


def drawn(data: Sequence[Stream], size: int, seed: int, count: int) -> list[list[Batch]]:
    return list(itertools.islice(batches_of(data, WEIGHTS, size, seed), count))


def test_batches_go_through_the_sequences_of_the_fit_alone_and_evenly() -> None:
    data = [numbered(8, 2), numbered(5, 1, source=1)]
    found = drawn(data, 2, 0, 6)
    for index, (count, each) in enumerate([(6, 2), (4, 3)]):
        numbers = [int(n) for batch in found for n in batch[index].tokens[:, 0]]
        assert sorted(numbers[:count]) == list(range(count))
        assert sorted(numbers) == sorted(list(range(count)) * each)
    for batch in found:
        for own, source in zip(batch, data, strict=True):
            assert own.teacher[..., 0].equal(own.tokens.float())
            assert (own.source, own.weight) == (source.source, WEIGHTS[source.source])


def test_batches_are_no_larger_than_the_data() -> None:
    (batch, _) = drawn([numbered(3, 1), numbered(9, 1)], 4, 0, 2)
    assert [len(own.tokens) for own in batch] == [2, 4]


def test_the_order_of_sequences_is_that_of_the_seed() -> None:
    def order(seed: int) -> list[int]:
        return [int(batch[0].tokens[0, 0]) for batch in drawn([numbered(50, 0)], 1, seed, 40)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_without_held_out_data_the_data_of_the_fit_judges() -> None:
    made = make()
    network, point, data = made.network(), made.point(), made.data(held_out=0)
    assert verdict_of(network, point, data).losses[0] > 0
    judged = [replace(own, share=replace(own.share, held_out=own.merged.shape[0])) for own in data]
    assert verdict_of(network, point, data) == verdict_of(network, point, judged)


@pytest.mark.parametrize("size", [2, 3])
def test_batches_of_all_processes_make_those_of_one(size: int) -> None:
    def batches(stream: Stream) -> list[set[int]]:
        drawn = batches_of([stream], WEIGHTS, 2, seed=3)
        found = []
        for _ in range(8):
            (batch,) = next(drawn)
            assert batch.total_tokens == 2 * 3
            found.append(set(batch.tokens[:, 0].tolist()))
        return found

    (alone,) = map(batches, streams_of(1, 9, 2, turn=1))
    shares = list(map(batches, streams_of(size, 9, 2, turn=1)))
    for number, whole in enumerate(alone):
        assert set.union(*(share[number] for share in shares)) == whole
        assert sum(len(share[number]) for share in shares) == len(whole)


def test_held_out_sequences_are_numbered_from_the_first_of_them() -> None:
    for stream in streams_of(2, 7, 3, turn=0):
        held_out = stream.of("held_out")
        assert [4 + n for n in held_out.share.numbers] == held_out.merged[:][:, 0].tolist()
        assert held_out.share.count("held_out") == 3
