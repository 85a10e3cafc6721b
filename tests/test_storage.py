"""Hidden states kept on the host and on disk: the same numbers, read as they are asked for."""

from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting.storage import OnDisk, Sequences, Storage, StreamPlace, choose_storage

CPU = torch.device("cpu")
HIDDEN = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))


def kept(place: StreamPlace, folder: Path) -> Sequences:
    return Storage(place, folder).keep(iter(HIDDEN.split(3)), len(HIDDEN))


@pytest.mark.parametrize("place", ["host", "device", "disk"])
@pytest.mark.parametrize(
    "index", [slice(None), slice(0, 1), slice(2, 6), slice(5, 9), torch.tensor([6, 0, 3])]
)
def test_what_is_kept_is_read_back(
    place: StreamPlace, index: slice | Tensor, tmp_path: Path
) -> None:
    found = kept(place, tmp_path)
    assert found.shape == HIDDEN.shape
    assert found[index].equal(HIDDEN[index])
    assert found[index].equal(HIDDEN[index])  # and again
    inner = found.narrow(0, 2, 4)
    assert inner.shape == (4, 5, 3)
    assert inner[1:3].equal(HIDDEN[3:5])
    assert inner.narrow(0, 1, 2)[:].equal(HIDDEN[3:5])


def test_files_have_no_name_and_leave_nothing_behind(tmp_path: Path) -> None:
    found = kept("disk", tmp_path)
    assert isinstance(found, OnDisk)
    assert not list(tmp_path.iterdir())


def test_consecutive_sequences_are_asked_for(tmp_path: Path) -> None:
    found = kept("disk", tmp_path)
    with pytest.raises(IndexError, match="consecutive"):
        found[::2]
    with pytest.raises(IndexError, match="first dimension"):
        found.narrow(1, 0, 2)


def test_auto_takes_the_host_as_long_as_it_has_room(tmp_path: Path) -> None:
    memory = psutil.virtual_memory().total
    assert choose_storage("auto", 1000, CPU, tmp_path).place == "host"
    assert choose_storage("auto", memory // 2, CPU, tmp_path).place == "disk"
    assert choose_storage("host", memory // 2, CPU, tmp_path).place == "host"
    assert choose_storage("disk", 1000, CPU, tmp_path).place == "disk"
