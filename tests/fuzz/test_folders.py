"""Files of a merged folder of any content: the report, the lock, the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_dam.cli import main
from mergekit_dam.errors import DamError
from mergekit_dam.host import plugin
from mergekit_dam.lock.folder import files_in, output_of
from mergekit_dam.lock.schema import LOCK_NAME
from mergekit_dam.model.checkpoint import check_checkpoint
from mergekit_dam.reproduce.reproduce import reproduce
from tests.kit.damage import changed, changed_json, changed_safetensors, damaged
from tests.kit.guard import guarded
from tests.kit.reports import report_values

pytestmark = pytest.mark.slow

DIGEST = 64 * "a"
LOCK: dict[str, Any] = {
    "schema_version": 1,
    "configuration": yaml.safe_dump(
        {
            "merge_method": "dam",
            "models": [
                {"model": "org/a", "parameters": {"calibration": "a.jsonl"}},
                {"model": "b", "parameters": {"calibration": ["a.jsonl", "org/text"]}},
            ],
            "parameters": {"samples": 4},
        }
    ),
    "options": {"out_shard_size": 5, "clone_tensors": False},
    "parameters": {},
    "sources": [
        {
            "name": "org/a",
            "model": {"name": "org/a", "repository": "org/a", "revision": "1", "files": {}},
        },
        {"name": "b", "model": {"name": "b", "files": {}}},
    ],
    "calibration": {
        "org/a": {"sha256": DIGEST, "source": "a.jsonl"},
        "b": {"sha256": DIGEST, "parts": [{"sha256": DIGEST, "dataset": "org/text"}]},
    },
    "replayed": False,
    "versions": {"torch": "2"},
    "computed_on": {"device": "cpu", "threads": 1},
    "output": {
        "files": {"config.json": DIGEST, "model.safetensors": DIGEST},
        "report": DIGEST,
        "tensors": {"w": {"dtype": "F32", "shape": [2, 3], "sha256": DIGEST}},
    },
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({"w": torch.ones(2, 3), "v": torch.zeros(4)}, file, metadata={"format": "pt"})
    return file.read_bytes()


def run(*arguments: object) -> None:
    """Run a command; it ends well, or says what is wrong, and never that it did not expect it."""
    done = CliRunner().invoke(main, [str(own) for own in arguments])
    assert done.exit_code in (0, 1), done.output
    assert "not expected" not in done.output, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


@given(content=changed_json(report_values(layers=2)))
def test_a_report(content: bytes) -> None:
    with guarded() as folder:
        (folder / "dam_report.json").write_bytes(content)
        run("report", folder)
        run("report", folder, "--json")


@given(content=changed_json(LOCK))
def test_a_lock_that_is_verified(weights: bytes, content: bytes) -> None:
    with guarded() as folder:
        (folder / LOCK_NAME).write_bytes(content)
        (folder / "model.safetensors").write_bytes(weights)
        run("verify", folder)
        run("verify", folder, "--json")


@pytest.fixture
def merge_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that is reached ends at once."""

    def run_merge(*_: Any, **__: Any) -> None:
        raise DamError("the merge begins")

    plugin.install()
    monkeypatch.setattr(plugin, "run_merge", run_merge)


def follow(content: bytes, refit: bool) -> None:
    with guarded() as folder:
        (folder / "out").mkdir()
        (folder / "b").mkdir()
        (folder / "a.jsonl").write_text('{"text": "a"}')
        (folder / "out" / LOCK_NAME).write_bytes(content)
        reproduce(folder / "out", refit=refit, quiet=True)


@pytest.mark.usefixtures("merge_begins")
@given(content=changed_json(LOCK), refit=st.booleans())
def test_a_lock_that_is_followed(content: bytes, refit: bool) -> None:
    follow(content, refit)


@pytest.mark.usefixtures("merge_begins")
@given(tree=changed(yaml.safe_load(LOCK["configuration"])), refit=st.booleans())
def test_a_lock_whose_configuration_was_changed(tree: Any, refit: bool) -> None:
    text = json.dumps(tree)  # which is YAML, too
    follow(json.dumps({**LOCK, "configuration": text}).encode(), refit)


@given(data=st.data())
def test_weights_that_are_hashed(weights: bytes, data: st.DataObject) -> None:
    content = data.draw(changed_safetensors(weights))
    with guarded() as folder:
        (folder / "model.safetensors").write_bytes(content)
        output_of(folder, files_in(folder), quiet=True)


INDEX = {"metadata": {"total_size": 40}, "weight_map": {"w": "one.safetensors", "v": "two"}}


@given(data=st.data(), index=changed_json(INDEX) | st.none())
def test_a_checkpoint(weights: bytes, data: st.DataObject, index: bytes | None) -> None:
    with guarded() as folder:
        content = data.draw(changed_safetensors(weights) | st.just(weights))
        names = ["one.safetensors", "two"] if index is not None else ["model.safetensors"]
        for name in names:
            (folder / name).write_bytes(content)
        if index is not None:
            (folder / "model.safetensors.index.json").write_bytes(index)
        check_checkpoint(folder)


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file: Path = tmp_path_factory.mktemp("pickled") / "pytorch_model.bin"
    torch.save({"w": torch.ones(2, 3)}, file)
    return file.read_bytes()


@given(data=st.data())
def test_pickled_weights_that_are_hashed(pickled: bytes, data: st.DataObject) -> None:
    content = data.draw(damaged(pickled) | st.binary(max_size=50))
    with guarded() as folder:
        (folder / "pytorch_model.bin").write_bytes(content)
        check_checkpoint(folder)
        output_of(folder, files_in(folder), quiet=True)
