"""Digests of a folder's files and tensors."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_dam.errors import CheckpointError
from mergekit_dam.lock.folder import files_in, output_of

TENSORS = {
    "w": torch.randn(300, 70),
    "half": torch.randn(5, 3).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "count": torch.arange(4),
    "none": torch.zeros(0, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dam_report.json").write_text(json.dumps({"a": 1, "this_run": {"seconds": 2}}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("pickled", [False, True])
def test_tensors_are_hashed_by_their_bytes(folder: Path, pickled: bool) -> None:
    name = "pytorch_model.bin" if pickled else "model.safetensors"
    if pickled:
        torch.save(TENSORS, folder / name)
    else:
        save_file(TENSORS, folder / name)
    found = output_of(folder, files_in(folder), quiet=True)
    for tensor, value in TENSORS.items():
        assert found.tensors[tensor].sha256 == hashlib.sha256(bytes_of(value)).hexdigest(), tensor
        assert found.tensors[tensor].shape == tuple(value.shape)
    assert found.tensors.keys() == TENSORS.keys()
    assert found.files.keys() == {"config.json", name}
    assert found.files[name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_report_counts_without_what_differs_from_run_to_run(folder: Path) -> None:
    def digest(**values: object) -> str | None:
        (folder / "dam_report.json").write_text(json.dumps(values))
        return output_of(folder, [], quiet=True).report

    assert digest(a=1, this_run={"seconds": 3}) == digest(this_run={}, a=1) == digest(a=1)
    assert digest(a=1) != digest(a=2)


def test_a_file_that_is_cut_off_is_refused_or_has_no_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged \(the entry of"):
        output_of(folder, [file.name], quiet=True)
    assert not output_of(folder, [file.name], quiet=True, intact=False).tensors


def test_the_lock_the_report_what_is_for_people_and_hidden_files_are_not_listed(
    folder: Path,
) -> None:
    for name in ("dam_lock.json", "README.md", "page.html", ".git/config", "sub/f.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert files_in(folder) == ["config.json", "sub/f.jinja"]
