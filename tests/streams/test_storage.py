"""Hidden states kept on the host and on disk: the same numbers, read as they are asked for."""

from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from mergekit_dam.choices import Offload
from mergekit_dam.streams.outputs import OutputCache, cache_bytes, outputs_sizes
from mergekit_dam.streams.storage import DiskTensor, Location, Sequences, Storage, choose_storage
from tests.kit.tensors import CPU

HIDDEN = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))


def kept(place: Location, folder: Path) -> Sequences:
    return Storage(place, folder=folder).keep(iter(HIDDEN.split(3)), len(HIDDEN))


@pytest.mark.parametrize("place", ["host", "device", "disk"])
@pytest.mark.parametrize(
    "index", [slice(None), slice(0, 1), slice(2, 6), slice(5, 9), torch.tensor([6, 0, 3])]
)
def test_kept_states_are_read_back(place: Location, index: slice | Tensor, tmp_path: Path) -> None:
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
    assert isinstance(found, DiskTensor)
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


@pytest.mark.parametrize(("offload", "outputs"), [("auto", "disk"), ("host", "host")])
def test_outputs_of_units_go_to_disk_on_a_cpu_by_default(
    offload: Offload, outputs: Location, tmp_path: Path
) -> None:
    assert choose_storage(offload, 1000, CPU, tmp_path).outputs == outputs


def test_outputs_of_units_are_kept_as_far_as_there_is_room(tmp_path: Path) -> None:
    sizes: dict[Location, int] = {
        "host": psutil.virtual_memory().total,
        "disk": psutil.disk_usage(str(tmp_path)).free,
    }
    for place, whole in sizes.items():
        storage = Storage("host", place, tmp_path)
        assert storage.has_room_for_outputs(whole // 8)
        assert not storage.has_room_for_outputs(whole // 2)


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_an_output_cache_gives_back_what_it_kept(place: Location, tmp_path: Path) -> None:
    cache = OutputCache(Storage("host", place, tmp_path), keep=True)
    exact = {"a": torch.float32, "b": torch.float32}
    cache.add(0, slice(0, 3), {"a": HIDDEN[:3], "b": HIDDEN[:3, :, :2]}, exact)
    cache.add(1, slice(0, 3), {"a": HIDDEN[1:4]}, exact)
    cache.add(0, slice(3, 6), {"a": HIDDEN[3:6]}, exact)
    first = cache.of(0, slice(0, 3), CPU)
    assert set(first) == {"a", "b"}
    assert first["a"].equal(HIDDEN[:3])
    assert first["b"].equal(HIDDEN[:3, :, :2])
    assert cache.of(1, slice(0, 3), CPU)["a"].equal(HIDDEN[1:4])
    assert set(cache.of(0, slice(0, 3), CPU, only=frozenset({"b"}))) == {"b"}
    assert cache.of(0, slice(6, 7), CPU) == {}
    cache.forget(["a"])
    assert set(cache.of(0, slice(0, 3), CPU)) == {"b"}
    assert cache.of(1, slice(0, 3), CPU) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("place", "size"), [("device", 2), ("host", 2), ("disk", 4)])
def test_outputs_of_products_in_bfloat16_are_kept_exactly_in_half_the_memory(
    place: Location, size: int, tmp_path: Path
) -> None:
    output = HIDDEN[:3].bfloat16().float()
    precisions = {"a": torch.bfloat16}
    cache = OutputCache(Storage("host", place, tmp_path), keep=True)
    cache.add(0, slice(0, 3), {"a": output}, precisions)
    found = cache.of(0, slice(0, 3), CPU)["a"]
    assert found.dtype == torch.bfloat16
    assert found.float().equal(output)
    assert outputs_sizes({"a": output}, precisions, place) == {"a": size * output.numel()}


def test_room_is_found_for_what_takes_the_place_of_what_is_fitted() -> None:
    assert cache_bytes({"a": 3, "b": 5}, {"b"}) == 3 + 2 * 5


def test_an_output_cache_that_keeps_nothing_has_nothing(tmp_path: Path) -> None:
    cache = OutputCache(Storage("host", "disk", tmp_path), keep=False)
    cache.add(0, slice(0, 3), {"a": HIDDEN[:3]}, {"a": torch.float32})
    assert cache.of(0, slice(0, 3), CPU) == {}
