"""Merges into places where something is already, or that fail: a whole model, or none."""

import importlib
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from transformers import AutoModelForCausalLM

from mergekit_dam.errors import DamError
from tests.kit.merging import Merged, dam, linear, merge, refused, tensors_of
from tests.kit.models import Models
from tests.kit.networks import files_under
from tests.kit.processes import BIN, torchrun
from tests.kit.reads import watched_reads
from tests.kit.signals import Running
from tests.kit.texts import Calibration

SHARDS = {"out_shard_size": 4000}


@pytest.fixture
def configuration(llama_models: Models, calibration: Calibration) -> dict[str, Any]:
    return dam(llama_models.models, calibration)


def contents(folder: Path) -> Mapping[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_read_as(folder: Path, expected: Merged) -> None:
    """Assert that transformers and mergekit find the weights of a merge in a folder."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    lazy = LazyTensorLoader.from_disk(str(folder))
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(lazy.get_tensor(name), tensor, rtol=0, atol=0)


@pytest.mark.parametrize(("before", "after"), [({}, SHARDS), (SHARDS, {})], ids=["more", "fewer"])
def test_an_older_merge_with_other_shards_is_replaced_as_a_whole(
    configuration: dict[str, Any],
    llama_models: Models,
    tmp_path: Path,
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    expected = merge(configuration, tmp_path / "expected")
    out = tmp_path / "out"
    merge(linear(llama_models.models), out, **before)
    (out / "notes.txt").write_text("mine")
    merge(configuration, out, **after)
    is_read_as(out, expected)
    assert (out / "notes.txt").read_text() == "mine"
    assert (len(list(out.glob("model*.safetensors"))) > 1) is bool(after)
    assert not any(tmp_path.glob(".dam-*"))


def test_the_card_has_the_name_of_the_folder(configuration: dict[str, Any], tmp_path: Path) -> None:
    merge(configuration, tmp_path / "my-merge")
    assert "\n# my-merge\n" in (tmp_path / "my-merge" / "README.md").read_text("utf-8")


def test_a_source_as_output_is_refused(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    own = shutil.copytree(llama_models.models[0], tmp_path / "own")
    before = contents(own)
    with pytest.raises(DamError, match="apart from the models that are merged"):
        merge(dam([own, llama_models.models[1]], calibration), own)
    assert contents(own) == before


def test_a_model_that_is_no_merge_is_not_replaced(
    configuration: dict[str, Any], llama_models: Models, tmp_path: Path
) -> None:
    own = shutil.copytree(llama_models.models[0], tmp_path / "own")
    before = contents(own)
    with pytest.raises(DamError, match=r"no mergekit_config\.yml"):
        merge(configuration, own)
    assert contents(own) == before


def test_a_file_in_the_way_is_told_before_a_weight_is_read(
    configuration: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    refused(configuration, tmp_path / "file" / "out", "is a file")
    assert (tmp_path / "file").read_text() == "mine"


def test_too_little_room_is_told_before_anything_is_fitted(
    configuration: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with watched_reads() as reads, pytest.raises(DamError, match="are free on the disk of the out"):
        merge(configuration, tmp_path / "out")
    assert {name for _, name in reads.order} <= {"model.embed_tokens.weight"}  # for the first stage
    assert files_under(tmp_path) == set()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "no room is left on the disk"),
        (RuntimeError("broken"), r"its tokenizer cannot be copied \(broken\)"),
    ],
)
def test_a_tokenizer_that_cannot_be_copied_ends_the_merge(
    configuration: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    older = merge(configuration, tmp_path / "out")
    before = contents(older.path)
    monkeypatch.setattr(importlib.import_module("mergekit.merge"), "_copy_tokenizer", fail)
    with pytest.raises(DamError, match=message):
        merge({**configuration, "dtype": "float16"}, older.path)
    assert contents(older.path) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "dam_report.json"])
def test_a_merge_that_lacks_a_file_does_not_end_well(
    configuration: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = importlib.import_module("mergekit.merge")
    stock = module._copy_tagalong_files

    def lose(config: Any, out_path: str, **rest: Any) -> None:  # the last thing that it does
        stock(config, out_path, **rest)
        (Path(out_path) / name).unlink()

    monkeypatch.setattr(module, "_copy_tagalong_files", lose)
    with pytest.raises(DamError, match=name):
        merge(configuration, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {".dam-out"}
    assert {path.name for path in (tmp_path / ".dam-out").iterdir()} == {"kept", "lock"}


def test_a_damaged_file_does_not_end_well(
    configuration: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("mergekit.merge")

    def cut(config: Any, out_path: str, **_: Any) -> None:
        file = Path(out_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    monkeypatch.setattr(module, "_copy_tagalong_files", cut)
    with pytest.raises(DamError, match=r"model\.safetensors cannot be read back"):
        merge(configuration, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {".dam-out"}
    assert {path.name for path in (tmp_path / ".dam-out").iterdir()} == {"kept", "lock"}


class TestOtherProcesses:
    """A merge under way in another process."""

    @pytest.fixture
    def file(self, llama_models: Models, calibration: Calibration, tmp_path: Path) -> Path:
        long = dam(llama_models.models, calibration, objective="logits", steps=100_000)
        file = tmp_path / "dam.yaml"
        file.write_text(yaml.safe_dump(long), encoding="utf-8")
        return file

    @pytest.mark.slow
    def test_keeps_others_out_until_it_is_killed(
        self, file: Path, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        out = merge(configuration, tmp_path / "out").path
        before = contents(out)
        running = Running([BIN / "mergekit-yaml", file, out], tmp_path / "log")
        running.wait(lambda: any(tmp_path.glob(".dam-out/kept/.dam-*/*")))
        with pytest.raises(DamError, match=r"another merge to this folder is under way \(process"):
            merge(configuration, out)
        running.send(signal.SIGKILL)
        assert running.finish() == -signal.SIGKILL
        assert contents(out) == before
        assert any(tmp_path.glob(".dam-out/kept/.dam-*/*"))
        merge({**configuration, "dtype": "float16"}, out)
        assert {t.dtype for t in tensors_of(out).values()} == {torch.float16}
        assert not [name for name in files_under(tmp_path) if ".dam-" in name]

    @pytest.mark.slow
    def test_what_torchrun_leaves_when_all_are_killed_goes_with_the_next_merge(
        self, file: Path, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        running = torchrun("--no-python", BIN / "mergekit-yaml", file, tmp_path / "out")
        try:
            while len(list(tmp_path.glob(".dam-out/**/.dam-entered"))) < 2:
                assert running.poll() is None, running.communicate()[0]
        finally:
            started = psutil.Process(running.pid)
            for process in [*started.children(recursive=True), started]:
                process.kill()
            running.communicate()
        merge(configuration, tmp_path / "out")
        assert not [name for name in files_under(tmp_path) if ".dam-" in name]
