"""Damaged checkpoints: the file is named, and no value is read."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from mergekit_dam.errors import CheckpointError
from mergekit_dam.model.checkpoint import check_checkpoint

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WHOLE = save({"a": torch.ones(4, 4), "b": torch.zeros(3)})
SIZE = struct.unpack("<Q", WHOLE[:8])[0]


def one(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / ONE).write_bytes(content)


def header(entries: object) -> Callable[[Path], object]:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return one(struct.pack("<Q", len(text)) + text + bytes(64))


def entry(**changes: object) -> Callable[[Path], object]:
    return header({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **changes}})


def sharded(folder: Path) -> None:
    save_file({"a": torch.ones(4, 4)}, folder / FIRST)
    save_file({"b": torch.zeros(3)}, folder / SECOND)
    write_index(folder, {"a": FIRST, "b": SECOND})


def write_index(folder: Path, weights: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def after(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    """One step after the other."""

    def all_steps(folder: Path) -> None:
        for step in steps:
            step(folder)

    return all_steps


def index(weights: object) -> Callable[[Path], object]:
    return after(sharded, lambda folder: write_index(folder, weights))


def spoilt(name: str, content: bytes) -> Callable[[Path], object]:
    return after(sharded, lambda folder: (folder / name).write_bytes(content))


def without(name: str) -> Callable[[Path], object]:
    return after(sharded, lambda folder: (folder / name).unlink())


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda _: None, "got an empty folder; download or copy the whole model"),
    "files of another kind": (lambda f: (f / "weights.h5").touch(), "got weights.h5"),
    "empty": (one(b""), f"{ONE}: required weights, got an empty file"),
    "a few bytes": (one(b"abc"), f"{ONE}: damaged"),
    "half of it": (one(WHOLE[: len(WHOLE) // 2]), f"{ONE}: damaged"),
    "a header alone": (one(WHOLE[: 8 + SIZE]), f"{ONE}: damaged"),
    "bytes at the end": (one(WHOLE + b"more"), f"{ONE}: damaged"),
    "one byte less": (one(WHOLE[:-1]), f"{ONE}: damaged"),
    "a header of 4 EiB": (one(struct.pack("<Q", 2**62) + WHOLE[8:]), f"{ONE}: damaged"),
    "a header of 2**64 - 1": (one(b"\xff" * 8 + WHOLE[8:]), f"{ONE}: damaged"),
    "a header beyond the file": (one(struct.pack("<Q", 10**6) + WHOLE[8:]), f"{ONE}: damaged"),
    "garbage": (one(bytes(range(256)) * 8), f"{ONE}: damaged"),
    "a header that is no JSON": (header(b"{nothing"), f"{ONE}: damaged"),
    "a header that is a list": (header([]), f"{ONE}: damaged"),
    "an unknown dtype": (entry(dtype="F99"), f"{ONE}: damaged"),
    "a shape that does not fit": (entry(shape=[17]), f"{ONE}: damaged"),
    "a shape below zero": (entry(shape=[-16]), f"{ONE}: damaged"),
    "a shape that overflows": (entry(shape=[2**40, 2**40]), f"{ONE}: damaged"),
    "offsets beyond the file": (entry(data_offsets=[0, 640]), f"{ONE}: damaged"),
    "offsets in reverse": (entry(data_offsets=[64, 0]), f"{ONE}: damaged"),
    "a web page": (one(b"<!DOCTYPE html><html>not found</html>"), f"{ONE}: damaged"),
    "a pointer of LFS": (one(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a folder": (lambda f: (f / ONE).mkdir(), f"{ONE}: required a file with weights, got a folder"),
    "a pipe": (lambda f: os.mkfifo(f / ONE), f"{ONE}: required a file with weights"),
    "a link to nothing": (lambda f: (f / ONE).symlink_to("gone"), f"{ONE}: missing, or a link"),
    "an index that is empty": (spoilt(INDEX, b""), f"{INDEX}: no JSON"),
    "an index cut off": (spoilt(INDEX, b'{"weight_map"'), f"{INDEX}: no JSON"),
    "an index too deep": (spoilt(INDEX, b"[" * 100_000), f"{INDEX}: no JSON"),
    "an index in Latin-1": (spoilt(INDEX, b'{"\xe9": 1}'), f"{INDEX}: no JSON"),
    "an index that is a list": (spoilt(INDEX, b"[]"), f"{INDEX}: required a `weight_map`"),
    "an index of nothing": (spoilt(INDEX, b"{}"), f"{INDEX}: required a `weight_map`"),
    "an index of no tensors": (index({}), f"{INDEX}: required a `weight_map`"),
    "an index of numbers": (index({"a": 1}), f"{INDEX}: no name of a file for a"),
    "an index of another folder": (index({"a": "../x.safetensors"}), "in its own folder"),
    "an index of an absolute path": (index({"a": "/etc/passwd"}), "in its own folder"),
    "an index of a folder inside": (index({"a": "in/x.safetensors"}), "in its own folder"),
    "an index of another tensor": (index({"c": FIRST}), f"{FIRST}: has no tensor c"),
    "an index of the other shard": (index({"a": SECOND}), f"{SECOND}: has no tensor a"),
    "the first shard missing": (without(FIRST), f"{INDEX}: lists {FIRST}, which is not"),
    "the second shard missing": (without(SECOND), f"{INDEX}: lists {SECOND}, which is not"),
    "a shard that is empty": (spoilt(SECOND, b""), f"{SECOND}: required weights, got an empty"),
    "a shard cut off": (spoilt(SECOND, WHOLE[:-5]), f"{SECOND}: damaged"),
    "a shard that is a pointer": (spoilt(SECOND, b"version https://git-lfs"), "git lfs pull"),
    "a whole file beside a stale index": (
        after(without(SECOND), one(WHOLE)),
        f"{ONE} beside it has weights, too: delete the one that is old",
    ),
    "a whole file beside whole shards": (
        after(sharded, one(WHOLE)),
        "transformers would read other files than mergekit",
    ),
    "an empty pickle": (
        lambda f: (f / "pytorch_model.bin").touch(),
        "pytorch_model.bin: required weights, got an empty file",
    ),
    "a pickle cut off": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no end"),
        "pytorch_model.bin: damaged, its end is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(tmp_path)
    assert str(tmp_path) in error.value.message
    assert message in error.value.message
    assert sorted(tmp_path.iterdir()) == before


def pickled(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("a", "b")


@pytest.mark.parametrize(
    "make",
    [
        one(WHOLE),
        sharded,
        pickled,
        lambda f: (f / "adapter_config.json").touch(),
        index({"a": FIRST}),
    ],
    ids=["one file", "shards", "pickle", "adapter", "an index of some tensors"],
)
def test_a_whole_checkpoint_is_accepted(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path)
    check_checkpoint(tmp_path)
