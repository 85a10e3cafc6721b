"""Files of coefficients that were changed, or that another program wrote: refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file

from mergekit_dam.coefficients.file import FILE_NAME, METADATA_KEY, CoefficientFile
from mergekit_dam.errors import ConfigError, DamError
from mergekit_dam.stored import read_header

GOOD: dict[str, Any] = {"sources": ["a", "b"], "axes": {}}
ROWS = {"w": torch.tensor([[0.3, 0.2], [0.7, 0.8]])}


def changed(value: float) -> dict[str, torch.Tensor]:
    rows = ROWS["w"].clone()
    rows[1, 0] = value
    return {"v": ROWS["w"], "w": rows}


BAD: dict[str, tuple[dict[str, torch.Tensor], Any, str]] = {
    "no metadata": (ROWS, None, "no entry of this package"),
    "metadata that is no JSON": (ROWS, "{", "no JSON"),
    "metadata too deep": (ROWS, "[" * 100_000, "no JSON (it is nested too deeply)"),
    "metadata that is a list": (ROWS, [], "its metadata is a list, not an object"),
    "metadata that is a number": (ROWS, 5, "its metadata is a int, not an object"),
    "no sources": (ROWS, {"axes": {}}, "no list of `sources`"),
    "sources that are a text": (ROWS, {"sources": "ab"}, "no list of `sources`"),
    "sources that are a mapping": (ROWS, {"sources": {"a": 1}}, "no list of `sources`"),
    "sources of nothing": (ROWS, {"sources": []}, "no list of `sources`"),
    "sources that are numbers": (ROWS, {"sources": [1, 2]}, "are not names"),
    "a source twice": (ROWS, {"sources": ["a", "a"]}, "name a model twice"),
    "a million sources": (
        ROWS,
        {"sources": [str(i) for i in range(1_000_000)]},
        "required coefficients of shape [1000000, n]",
    ),
    "axes that are a list": (ROWS, {**GOOD, "axes": [0]}, "not whole numbers by tensor"),
    "axes that are texts": (ROWS, {**GOOD, "axes": {"w": "0"}}, "not whole numbers by tensor"),
    "axes that are true": (ROWS, {**GOOD, "axes": {"w": True}}, "not whole numbers by tensor"),
    "an axis of seven": (ROWS, {**GOOD, "axes": {"w": 7}}, "dimension 7 for w"),
    "parameters that are a list": (
        ROWS,
        {**GOOD, "parameters": []},
        "`parameters` in its",
    ),
    "versions that are a text": (
        ROWS,
        {**GOOD, "versions": "1"},
        "`versions` in its metadata",
    ),
    "a digest that is a number": (
        ROWS,
        {**GOOD, "corrections": 1},
        "`corrections` in its",
    ),
    "digests that are a list": (ROWS, {**GOOD, "identities": {"a": []}}, "`identities` in its"),
    "a parameter that is NaN": (
        ROWS,
        {**GOOD, "parameters": {"ridge": float("nan")}},
        "its metadata is no JSON (Out of range",
    ),
    "half of a character": (ROWS, {**GOOD, "versions": {"a": "\ud800"}}, "is no JSON"),
    "no tensors": ({}, GOOD, "it has no coefficients"),
    "NaN": (changed(float("nan")), GOOD, "row 1 and column 0 for w is nan"),
    "infinity": (changed(float("inf")), GOOD, "row 1 and column 0 for w is inf"),
    "minus infinity": (changed(float("-inf")), GOOD, "row 1 and column 0 for w is -inf"),
    "a row less": ({"w": ROWS["w"][:1]}, GOOD, "shape [2, n], a row for each of its sources, got"),
    "a row more": ({"w": torch.ones(3, 2)}, GOOD, "got [3, 2] for w"),
    "no columns": ({"w": torch.ones(2, 0)}, GOOD, "got [2, 0] for w"),
    "one dimension": ({"w": torch.ones(2)}, GOOD, "got [2] for w"),
    "three dimensions": ({"w": torch.ones(2, 2, 2)}, GOOD, "got [2, 2, 2] for w"),
    "a single number": ({"w": torch.tensor(1.0)}, GOOD, "got [] for w"),
    "whole numbers": ({"w": torch.ones(2, 2, dtype=torch.int64)}, GOOD, "in F32, got I64 for w"),
    "another precision": ({"w": torch.ones(2, 2, dtype=torch.float16)}, GOOD, "got F16 for w"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_changed_file_is_refused_with_what_is_wrong_in_it(name: str, tmp_path: Path) -> None:
    tensors, metadata, message = BAD[name]
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    own = None if metadata is None else {METADATA_KEY: text}
    save_file(tensors, tmp_path / FILE_NAME, metadata=own)
    with pytest.raises(ConfigError) as error:
        CoefficientFile.load(tmp_path)
    assert f"coefficients: {tmp_path / FILE_NAME} was not written by a dam merge" in str(
        error.value
    )
    assert message in error.value.message
    assert len(error.value.message) < 600  # names of a million sources are not listed


def test_ten_million_sources_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """Their names alone are a header that is larger than safetensors reads."""
    file, size = tmp_path / FILE_NAME, 10_000_000 * len('"org/a", ')
    with file.open("wb") as opened:
        opened.write(size.to_bytes(8, "little"))
        opened.truncate(8 + size)  # zeros, which take no room on the disk
    with pytest.raises(ConfigError, match=r"was not written by a dam merge.*[Hh]eader"):
        CoefficientFile.load(tmp_path)


@pytest.mark.parametrize("size", [0, 10**6, 10**9, 2**63, 2**64 - 1])
def test_a_header_of_another_length_than_it_says_is_refused(size: int, tmp_path: Path) -> None:
    content = size.to_bytes(8, "little") + b"{}" + bytes(64)
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match="was not written by a dam merge"):
        CoefficientFile.load(tmp_path)
    with pytest.raises(ValueError, match="its header"):
        read_header(tmp_path / FILE_NAME)


@pytest.mark.parametrize("content", [b"", b"no file", b"\xff" * 64])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match="was not written by a dam merge"):
        CoefficientFile.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_in_memory_are_not_merged_with_coefficients_that_are_not_finite(
    value: float,
) -> None:
    pair = [torch.ones(3, 2), torch.zeros(3, 2)]
    with pytest.raises(DamError, match="required finite coefficients"):
        merge_tensors(pair, "dam", parameters={"coefficients": torch.tensor([[value], [0.5]])})
    pair[1][0, 0] = value
    with pytest.raises(DamError, match="the merged tensor is not finite"):
        merge_tensors(pair, "dam", parameters={"coefficients": torch.tensor([[0.5], [0.5]])})
