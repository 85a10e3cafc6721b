"""A merge that is stopped continues, and writes the bytes of one that nothing has stopped."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tensor_writer import TensorWriter

from mergekit_dam.errors import DamError
from tests.kit.merging import merge
from tests.kit.models import ARCHITECTURES, Models, save_models
from tests.kit.resuming import FITS, Stopped, Told, configured, contents, watched
from tests.kit.texts import Calibration

STOPS: dict[str, dict[str, str]] = {
    "layer, identity": {
        "input": "",
        "block 1/2": "the input was fitted",
        "block 2/2": "1 of 2 blocks were fitted",
        "output": "2 of 2 blocks were fitted",
    },
    "layer, sensitivity": {
        "start block 2/2": "",
        "backward block 1/2": "the start was surveyed",
        "input": "the metrics' gradients were made",
        "output": "2 of 2 blocks were fitted",
    },
    "logits": {
        "start block 1/2": "",
        "step 1/": "`start` was tried",
        "step 4/": "3 of 6 steps of a descent were taken",
        "step 6/": "5 of 6 steps of a descent were taken",
    },
    "layer+logits": {
        "backward block 2/2": "the start was surveyed",
        "block 2/2": "1 of 2 blocks were fitted",
        "step 1/": "`start` and `layer, sensitivity` were tried",
        "step 5/": "4 of 6 steps of a descent were taken",
    },
}
"""Where every kind of fit is stopped, and what is done by then."""

KINDS = [(fit, stop) for fit, stops in STOPS.items() for stop in stops]


@pytest.fixture(scope="module")
def undisturbed(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Any]:
    """What every kind of fit writes when nothing stops it."""
    found = {}
    for fit in FITS:
        configuration = configured(llama_models, calibration, fit)
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        found[fit] = contents(merge(configuration, out).path)
    return found


def continued(configuration: Mapping[str, Any], out: Path) -> Told:
    with watched() as told:
        merge(configuration, out)
    assert not any(out.parent.glob(".dam-*"))
    return told


@pytest.mark.parametrize(("fit", "stop"), KINDS)
def test_stopped_anywhere_it_has_the_same_bytes(
    fit: str,
    stop: str,
    llama_models: Models,
    calibration: Calibration,
    undisturbed: Mapping[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    configuration, out = configured(llama_models, calibration, fit), tmp_path / "out"
    with pytest.raises(Stopped), watched(stop) as before:
        merge(configuration, out)
    assert not out.exists()
    done = STOPS[fit][stop]
    assert ("what is done is kept in" in caplog.text) == bool(done)
    assert (tmp_path / ".dam-out").exists() == bool(done)
    after = continued(configuration, out)
    assert contents(out) == undisturbed[fit]
    # No block is fitted twice but that in which the merge was stopped, and no step is taken again.
    for word in ("start block", "backward block", "block", "output", "step"):
        twice = set(before.parts(word)) & set(after.parts(word))
        assert len(twice) <= 1, twice
    assert after.continued == ([f"continuing: {done} before"] if done else [])


@pytest.mark.parametrize("fit", FITS)
def test_where_nothing_is_kept_the_bytes_are_the_same(
    fit: str,
    llama_models: Models,
    calibration: Calibration,
    undisturbed: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    found = contents(
        merge(configured(llama_models, calibration, fit, resume=False), tmp_path / "out").path
    )
    with_it = {"README.md", "mergekit_config.yml", "dam_lock.json"}  # `resume` stands in these
    assert found.keys() == undisturbed[fit].keys()
    assert {n: own for n, own in found.items() if n not in with_it} == {
        n: own for n, own in undisturbed[fit].items() if n not in with_it
    }


class TestStops:
    """In the middle of a sweep that writes as it goes, or of a descent."""

    FIT = "layer, identity"

    @pytest.fixture
    def configuration(self, llama_models: Models, calibration: Calibration) -> dict[str, Any]:
        return configured(llama_models, calibration, self.FIT)

    def test_again_and_again_it_has_the_same_bytes(
        self,
        configuration: dict[str, Any],
        undisturbed: Mapping[str, Any],
        tmp_path: Path,
    ) -> None:
        for stop in ("block 2/2", "block 2/2", "output"):
            with pytest.raises(Stopped), watched(stop):
                merge(configuration, tmp_path / "out")
        told = continued(configuration, tmp_path / "out")
        assert told.continued == ["continuing: 2 of 2 blocks were fitted before"]
        assert contents(tmp_path / "out") == undisturbed[self.FIT]

    def test_stopped_before_anything_is_done_it_leaves_nothing(
        self, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        with pytest.raises(Stopped), watched("input"):
            merge(configuration, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("fit", ["layer, identity", "layer+logits"])
    def test_a_failure_while_the_model_is_written_costs_no_fit(
        self,
        llama_models: Models,
        calibration: Calibration,
        undisturbed: Mapping[str, Any],
        tmp_path: Path,
        fit: str,
    ) -> None:
        configuration, out = configured(llama_models, calibration, fit), tmp_path / "out"
        full = OSError(errno.ENOSPC, "No space left on device")
        with (
            watched(),
            mock.patch.object(TensorWriter, "finalize", side_effect=full),
            pytest.raises(DamError, match="no room is left on the disk"),
        ):
            merge(configuration, out)
        told = continued(configuration, out)
        assert not [line for line in told.shown if "block" in line or "step" in line]
        assert contents(out) == undisturbed[fit]

    @pytest.mark.parametrize("times", [5, 6], ids=["streams", "record"])
    def test_a_full_disk_while_something_is_kept_leaves_what_was_kept_before(
        self,
        configuration: dict[str, Any],
        undisturbed: Mapping[str, Any],
        tmp_path: Path,
        times: int,
    ) -> None:
        with (
            watched(),
            full_at(".safetensors.tmp", times=times),
            pytest.raises(DamError, match="no room is left on the disk"),
        ):
            merge(configuration, tmp_path / "out")
        told = continued(configuration, tmp_path / "out")
        assert told.continued == ["continuing: 1 of 2 blocks were fitted before"]
        assert contents(tmp_path / "out") == undisturbed[self.FIT]

    def test_a_shard_that_cannot_be_read_for_a_while_costs_the_block_that_it_stopped(
        self,
        configuration: dict[str, Any],
        undisturbed: Mapping[str, Any],
        tmp_path: Path,
    ) -> None:
        with (
            watched() as before,
            unreadable("model.layers.1."),
            pytest.raises(OSError, match="out"),
        ):
            merge(configuration, tmp_path / "out")
        assert before.parts("block") == ["block 1/2"]
        told = continued(configuration, tmp_path / "out")
        assert told.continued == ["continuing: 1 of 2 blocks were fitted before"]
        assert told.parts("block") == ["block 2/2"]
        assert contents(tmp_path / "out") == undisturbed[self.FIT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tied_and_turned_weights_of_finished_blocks_are_written_as_they_were(
    dtype: torch.dtype, calibration: Calibration, tmp_path: Path
) -> None:
    models = save_models(tmp_path, ARCHITECTURES["gpt2"](), count=2, dtype=dtype)
    configuration = configured(models, calibration, "layer, identity")
    expected = contents(merge(configuration, tmp_path / "whole" / "out").path)
    with pytest.raises(Stopped), watched("output"):
        merge(configuration, tmp_path / "out")
    assert continued(configuration, tmp_path / "out").continued
    assert contents(tmp_path / "out") == expected


@contextmanager
def unreadable(beginning: str) -> Iterator[None]:
    """A disk that cannot read tensors whose names begin so."""
    stock = LazyTensorLoader.get_tensor

    def get_tensor(loader: LazyTensorLoader, key: str, *rest: Any, **more: Any) -> Any:
        if key.startswith(beginning):
            raise OSError(errno.EIO, "Input/output error")
        return stock(loader, key, *rest, **more)

    with mock.patch.object(LazyTensorLoader, "get_tensor", get_tensor):
        yield


@contextmanager
def full_at(end: str, *, times: int) -> Iterator[None]:
    """A disk that is full when the files of some kind are opened for the n-th time."""
    stock, left = Path.open, [times]

    def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path.name.endswith(end) and "w" in mode:
            left[0] -= 1
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
        return stock(path, mode, *rest, **more)

    with mock.patch.object(Path, "open", opened):
        yield
