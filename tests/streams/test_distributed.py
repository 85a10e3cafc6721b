"""Sequences are divided between processes, and sums are taken over all."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from mergekit.options import MergeOptions

from mergekit_dam.streams import distributed, exchange
from mergekit_dam.streams.share import SPLITS
from tests.kit.processes import connecting_alone, streams_of


def test_alone_nothing_is_set_up() -> None:
    options, x = MergeOptions(), torch.arange(3.0)
    with distributed.joined_processes(options) as own:
        assert own is options
        assert not dist.is_initialized()
        assert distributed.is_first()
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.all_sum(x) is x
        assert distributed.all_rows(x) is x
        assert distributed.all_sums([1.0, 2.0]) == [1.0, 2.0]
        assert distributed.from_first(lambda: 5) == 5


def test_processes_are_disconnected_before_the_interpreter_ends(tmp_path: Path) -> None:
    with (
        mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": "0"}),
        connecting_alone(tmp_path) as at_exit,
    ):
        for _ in range(2):  # the second merge finds the first one's connection
            with distributed.joined_processes(MergeOptions()):
                assert dist.is_initialized()
    assert len(at_exit) == 1
    assert dist.is_initialized()
    at_exit[0]()
    assert not dist.is_initialized()


def test_numbers_are_summed_on_the_host_wherever_they_are() -> None:
    seen: list[torch.Tensor] = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.mul_(2)

    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert distributed.all_totals(one, two) == (one, two)
    with (
        mock.patch.object(distributed, "_several", return_value=True),
        mock.patch.object(exchange, "total", doubled),
        mock.patch.object(torch.Tensor, "cpu", lambda x: x + 10),
    ):
        found = distributed.all_totals(one, two)
    assert [float(total) for total in found] == [42.0, 44.0]
    assert seen[0].tolist() == [42.0, 44.0]


@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize(("count", "held_out"), [(7, 2), (8, 0), (2, 1), (4, 4)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_sequence_is_one_process_s(size: int, count: int, held_out: int, turn: int) -> None:
    streams = streams_of(size, count, held_out, turn)
    expected = {"fit": range(count - held_out), "held_out": range(count - held_out, count)}
    for split in SPLITS:
        seen = [n for s in streams for n in s.teacher[slice(*s.share.rows(split))][:, 0].tolist()]
        assert sorted(seen) == list(expected[split])
        assert {s.share.count(split) for s in streams} == {len(expected[split])}
    sizes = [len(s.share.numbers) for s in streams]
    assert max(sizes) - min(sizes) <= 1
