"""The lock's file: written, read, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.errors import DamError
from mergekit_dam.lock.schema import LOCK_NAME, Lock, read_lock

DIGEST = 64 * "a"
VALUES: dict[str, Any] = {
    "schema_version": 1,
    "configuration": "merge_method: dam\n",
    "options": {"out_shard_size": 5, "clone_tensors": False},
    "parameters": {},
    "sources": [{"name": "org/a", "model": {"name": "org/a", "files": {"config.json": DIGEST}}}],
    "calibration": {"org/a": {"sha256": DIGEST, "parts": []}},
    "replayed": False,
    "versions": {"torch": "2"},
    "computed_on": {"device": "cpu", "threads": 1},
    "output": {
        "files": {"model.safetensors": DIGEST},
        "report": DIGEST,
        "tensors": {"w": {"dtype": "F32", "shape": [2, 3], "sha256": DIGEST}},
    },
}


def test_writing_and_reading_are_inverse_and_the_text_is_canonical(tmp_path: Path) -> None:
    lock = Lock.model_validate(VALUES)
    lock.write(tmp_path)
    assert read_lock(tmp_path) == read_lock(tmp_path / LOCK_NAME) == lock
    text = (tmp_path / LOCK_NAME).read_text("utf-8")
    assert json.loads(text) == VALUES
    assert text == json.dumps(VALUES, indent=1, sort_keys=True) + "\n"


BAD: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "got a file that is damaged"),
    "a list": ("[]", "`schema_version` 1, got None"),
    "a later version": (json.dumps({**VALUES, "schema_version": 2}), "`schema_version` 1, got 2"),
    "a key too many": (json.dumps({**VALUES, "more": 1}), "more: extra inputs"),
    "a file in another folder": (
        json.dumps({**VALUES, "output": {**VALUES["output"], "files": {"../f": DIGEST}}}),
        "output.files.../f.[key]: value error, a name has to stay inside of its folder",
    ),
    "a file by its whole path": (
        json.dumps(
            {
                **VALUES,
                "sources": [
                    {"name": "a", "model": {"name": "a", "files": {"/etc/passwd": DIGEST}}}
                ],
            }
        ),
        "a name has to stay inside of its folder",
    ),
    "kept text in another folder": (
        json.dumps({**VALUES, "calibration": {"a": {"sha256": DIGEST, "kept": "../a.jsonl"}}}),
        "calibration.a.kept: value error, a name has to stay inside",
    ),
    "too deep": ("[" * 100_000, "it is nested too deeply"),
    "a number that JSON does not know": (
        json.dumps({**VALUES, "parameters": {"ridge": float("inf")}}),
        "got a file that is damaged",
    ),
    "half of a character": (
        json.dumps({**VALUES, "configuration": "\ud800"}),
        "got a file that is damaged",
    ),
    "no digest": (
        json.dumps({**VALUES, "output": {**VALUES["output"], "files": {"f": "abc"}}}),
        "output.files.f: string should match",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_lock_is_refused(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    (tmp_path / LOCK_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(DamError) as refused:
        read_lock(tmp_path)
    assert str(tmp_path / LOCK_NAME) in refused.value.message
    assert message in refused.value.message


def test_a_folder_without_a_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamError, match="merges of older versions wrote none"):
        read_lock(tmp_path)
