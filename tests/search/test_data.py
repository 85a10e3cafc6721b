"""Batches of the end-to-end objective, in one process and in several."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from mergekit_dam.search.data import Data
from mergekit_dam.search.descend import batches_of, verdict_of
from mergekit_dam.search.gradient import Batch
from mergekit_dam.streams.stream import Stream
from tests.kit.networks import make
from tests.kit.processes import streams_of


def numbered(count: int, held_out: int, source: int = 0) -> Data:
    """Data whose every sequence is its number."""
    tokens = torch.arange(count)[:, None].expand(-1, 3)
    return Data(source, 1.0 + source, tokens, tokens[..., None].float(), held_out)


def drawn(data: Sequence[Data], size: int, seed: int, count: int) -> list[list[Batch]]:
    return list(itertools.islice(batches_of(data, size, seed), count))


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
            assert (own.source, own.weight) == (source.source, source.weight)


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
    judged = [replace(own, held_out=len(own.tokens)) for own in data]
    assert verdict_of(network, point, data) == verdict_of(network, point, judged)


@pytest.mark.parametrize("size", [2, 3])
def test_batches_of_all_processes_make_those_of_one(size: int) -> None:
    def batches(stream: Stream) -> list[set[int]]:
        tokens = stream.merged
        assert isinstance(tokens, torch.Tensor)
        data = [Data(0, 1.0, tokens, tokens, stream.held_out, stream.numbers)]
        drawn = batches_of(data, 2, seed=3)
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
        tokens = stream.merged
        assert isinstance(tokens, torch.Tensor)
        data = Data(0, 1.0, tokens, tokens, stream.held_out, stream.numbers)
        held_out = data.of("held_out")
        assert [4 + n for n in held_out.own] == held_out.tokens[:, 0].tolist()
        assert held_out.stream(held_out.tokens).count("held_out") == 3
