"""The limit on a GPU's memory, on a GPU that is made up."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mergekit_dam.sources.network import has_room
from mergekit_dam.streams.memory import free_memory_of, limit_gpu, memory_of
from mergekit_dam.streams.storage import choose_storage
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.tensors import CPU

GPU = torch.device("cuda")
WHOLE = 1000


@pytest.fixture
def gpu() -> Iterator[mock.Mock]:
    """A GPU of 1000 bytes, 900 of them free; 60 are allocated, 100 reserved by this process."""
    fraction = [1.0]

    def numbered(device: object) -> None:
        """As torch does for a limit: it wants the number of a GPU."""
        assert device == 0

    def limit(value: float, device: object) -> None:
        numbered(device)
        fraction[0] = value

    def limited(device: object) -> float:
        numbered(device)
        return fraction[0]

    with mock.patch.multiple(
        torch.cuda,
        current_device=lambda: 0,
        get_device_properties=lambda _: SimpleNamespace(total_memory=WHOLE),
        set_per_process_memory_fraction=limit,
        get_per_process_memory_fraction=limited,
        mem_get_info=lambda _: (900, WHOLE),
        memory_allocated=lambda _: 60,
        memory_reserved=lambda _: 100,
    ):
        yield mock.Mock()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("limit", "whole", "free"), [(None, 1000, 940), (400, 400, 340), (5000, 1000, 940), (50, 50, 0)]
)
def test_a_limit_holds_for_all_that_asks(limit: int | None, whole: int, free: int) -> None:
    limit_gpu(GPU, limit)
    assert memory_of(GPU) == whole
    assert free_memory_of(GPU) == free
    assert has_room(free_memory_of(GPU), memory_of(GPU), 10) == (free > max(whole / 2, 120))


@pytest.mark.usefixtures("gpu")
def test_streams_stay_on_the_gpu_within_the_limit(tmp_path: Path) -> None:
    assert choose_storage("auto", 200, GPU, tmp_path).place == "device"
    limit_gpu(GPU, 400)
    storage = choose_storage("auto", 200, GPU, tmp_path)
    assert (storage.place, storage.outputs) == ("host", "device")
    assert storage.has_room_for_outputs(100)
    assert not storage.has_room_for_outputs(101)


def test_a_host_has_no_limit() -> None:
    before = memory_of(CPU)
    limit_gpu(CPU, 1)
    assert memory_of(CPU) == before
    assert 0 < free_memory_of(CPU) <= before


@pytest.mark.parametrize("size", ["12GB", "12 GiB", 12_000_000_000])
def test_a_merge_takes_a_size(
    size: str | int, llama_models: Models, calibration: tuple[Path, Path], tmp_path: Path
) -> None:
    config = dam(
        llama_models.models, list(calibration), objective="layer", metric="identity", samples=2
    )
    config["parameters"]["gpu_memory"] = size
    with mock.patch("mergekit_dam.host.fitted_graph.limit_gpu") as limited:
        merge(config, tmp_path / "out")
    assert limited.call_args.args[1] in (12 * 10**9, 12 * 2**30)
