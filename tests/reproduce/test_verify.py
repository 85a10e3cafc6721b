"""`mergekit-dam verify`: a folder against its lock."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mergekit_dam.cli import main
from tests.kit.models import MLP
from tests.kit.projects import Project


def verify(folder: Path) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was printed."""
    done = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    return done.exit_code, json.loads(done.stdout)


def change_a_tensor(out: Path) -> None:
    tensors = load_file(out / "model.safetensors")
    tensors[MLP][0, 0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def add_a_tensor(out: Path) -> None:
    tensors = load_file(out / "model.safetensors") | {"more": torch.ones(2)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        text = (out / name).read_text("utf-8")
        assert old in text
        (out / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "a tensor": (change_a_tensor, {MLP, "model.safetensors"}),
    "a tensor more": (add_a_tensor, {"more", "model.safetensors"}),
    "coefficients": (
        lambda out: (out / "dam_coefficients.safetensors").write_bytes(b"x"),
        {"dam_coefficients.safetensors"},
    ),
    "corrections": (
        lambda out: (out / "dam_corrections.safetensors").unlink(),
        {"dam_corrections.safetensors"},
    ),
    "the tokenizer": (rewrite("tokenizer.json", "cat", "dog"), {"tokenizer.json"}),
    "the configuration": (rewrite("config.json", "1e-06", "1e-05"), {"config.json"}),
    "the report": (rewrite("dam_report.json", '"fitted"', '"other"'), {"dam_report.json"}),
    "no report": (lambda out: (out / "dam_report.json").unlink(), {"dam_report.json"}),
    "a second file of weights": (
        lambda out: save_file({"w": torch.ones(1)}, out / "model-2.safetensors"),
        {"model-2.safetensors", "w"},
    ),
    "an index": (
        lambda out: (out / "model.safetensors.index.json").write_text("{}"),
        {"model.safetensors.index.json"},
    ),
}


def test_an_intact_folder_is_verified(merged_project: Project) -> None:
    code, told = verify(merged_project.out.path)
    assert (code, told["verified"], told["differences"]) == (0, True, [])
    assert told["tensors"] == len(merged_project.out.tensors)


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_named(project: Project, name: str) -> None:
    change, expected = CHANGES[name]
    change(project.out.path)
    code, told = verify(project.out.path)
    assert code == 1
    assert not told["verified"]
    assert {difference["name"] for difference in told["differences"]} == expected


def test_a_file_of_weights_that_is_cut_off_is_named_with_its_tensors(project: Project) -> None:
    file = project.out.path / "model.safetensors"
    tensors = set(project.out.tensors)
    file.write_bytes(file.read_bytes()[:-10])
    code, told = verify(project.out.path)
    assert code == 1
    assert {own["name"] for own in told["differences"]} == {file.name, *tensors}


def test_what_people_edit_and_add_does_not_count(project: Project) -> None:
    out = project.out.path
    (out / "README.md").write_text("# My model")
    (out / "notes.txt").write_text("good")
    rewrite("dam_report.json", '"seconds": {', '"seconds": {"more": 1,')(out)
    assert verify(out)[0] == 0


def test_people_read_it_in_words(project: Project) -> None:
    done = CliRunner().invoke(main, ["verify", str(project.out.path)])
    assert done.exit_code == 0
    assert "21 tensors and 9 files are as dam_lock.json says" in done.output
    change_a_tensor(project.out.path)
    done = CliRunner().invoke(main, ["verify", str(project.out.path)])
    assert done.exit_code == 1
    assert f"  - tensor {MLP}: other values (sha256 " in done.output


def test_a_folder_without_a_lock_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert done.exit_code == 1
    assert "required a dam_lock.json" in done.output
