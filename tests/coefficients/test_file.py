"""Coefficient files: saved, loaded, and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_dam.coefficients.file import FILE_NAME, CoefficientFile
from mergekit_dam.coefficients.rows import Identity
from mergekit_dam.errors import ConfigError


def saved(folder: Path) -> CoefficientFile:
    file = CoefficientFile(
        coefficients={"a.weight": torch.randn(2, 5), "b.bias": torch.randn(2, 1)},
        sources=("org/a", "org/b"),
        metadata={"axes": {"a.weight": 0}, "versions": {"torch": "2"}, "seed": 3, "none": None},
    )
    file.save(folder / FILE_NAME)
    return file


def named(*names: str) -> list[Identity]:
    return [Identity(name) for name in names]


@pytest.mark.parametrize("by", ["file", "folder"])
def test_save_and_load_are_inverse(tmp_path: Path, by: str) -> None:
    file = saved(tmp_path)
    loaded = CoefficientFile.load(tmp_path if by == "folder" else str(tmp_path / FILE_NAME))
    assert loaded.sources == file.sources
    assert loaded.metadata == file.metadata
    assert loaded.coefficients.keys() == file.coefficients.keys()
    for name, tensor in file.coefficients.items():
        assert loaded.coefficients[name].equal(tensor)


def test_coefficients_shared_by_tied_tensors_and_views_can_be_saved(tmp_path: Path) -> None:
    shared = torch.randn(2, 8)
    tensors = {
        "embed": shared,
        "head": shared,
        "strided": shared[:, ::2],
        "expanded": shared[:, :1],
    }
    CoefficientFile(tensors, ("a", "b"), {}).save(tmp_path / FILE_NAME)
    loaded = CoefficientFile.load(tmp_path)
    assert all(loaded.coefficients[name].equal(tensor) for name, tensor in tensors.items())


def test_problems_name_the_parameter_that_named_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"- start: no file at .*gone"):
        CoefficientFile.load(tmp_path / "gone", parameter="start")
    saved(tmp_path)
    file = CoefficientFile.load(tmp_path, parameter="start")
    with pytest.raises(ConfigError, match="- start: made from 2 models"):
        file.rows_of(named("org/a"))


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write leaves the file of before, whole."""
    file = saved(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("mergekit_dam.coefficients.file.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        file.save(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_saving_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    saved(tmp_path / "new" / "folder")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [FILE_NAME]


def test_rows_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    assert saved(tmp_path).rows_of(named("org/b", "org/a")) == [1, 0]


def test_unknown_names_are_refused_and_go_by_place_where_that_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = saved(tmp_path)
    with pytest.raises(ConfigError, match="changed_models: allow") as refused:
        file.rows_of(named("/ci/x", "/ci/y"))
    assert len(refused.value.problems) == 2
    assert not caplog.records
    assert file.rows_of(named("/ci/x", "/ci/y"), changed="allow") == [0, 1]
    for model, row in (("/ci/x", "org/a"), ("/ci/y", "org/b")):
        assert f"{model} has neither the weights nor the name" in caplog.text
        assert f"take the coefficients of {row}" in caplog.text


def test_another_number_of_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"made from 2 models \(org/a, org/b\), got 1 \(org/a\)"):
        saved(tmp_path).rows_of(named("org/a"))


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no file at .*{FILE_NAME}; give the path of a"):
        CoefficientFile.load(tmp_path)


@pytest.mark.parametrize("kind", ["no safetensors", "no sources", "no json", "text metadata"])
def test_a_file_that_dam_did_not_write_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "other.safetensors"
    tensors = {"a": torch.ones(1)}
    if kind == "no safetensors":
        path.write_bytes(b"not a header")
    elif kind == "no sources":
        save_file(tensors, path)
    elif kind == "no json":
        save_file(tensors, path, metadata={"sources": "[", "format": "pt"})
    else:  # what other tools write
        save_file(tensors, path, metadata={"format": "pt", "sources": json.dumps(["a"])})
    with pytest.raises(ConfigError, match=r"other\.safetensors was not written by a dam merge"):
        CoefficientFile.load(path)
