"""`inspect` and `diff`: against the tensors in the files."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_dam.coefficients.correction import Correction, Corrections
from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME, CoefficientFile
from mergekit_dam.inspection.layers import by_layer, elements
from tests.commands.conftest import Run
from tests.kit.merging import Merged

GENERATOR = torch.Generator().manual_seed(0)
SOURCES = ("org/a", "org/b", "org/base")
HEAD, FIRST, SECOND = "lm_head.weight", "model.layers.0.q.weight", "model.layers.10.q.weight"


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Coefficients of which org/b dominates two thirds of a tensor; a correction of low rank."""
    one = torch.tensor([[0.1, 0.2, 0.9], [0.8, 0.7, 0.3], [0.1, 0.1, -0.2]])
    corrections = Corrections(tmp_path / "kept")
    corrections.put(SECOND, Correction(left=drawn(4, 2), right=drawn(2, 3)))
    digest = corrections.save(tmp_path / "out" / CORRECTIONS_NAME)
    metadata = {"parameters": {"samples": 4}, "corrections": digest, "axes": {}}
    tensors = {SECOND: one, FIRST: one[:, :1], HEAD: one}
    CoefficientFile(tensors, SOURCES, metadata).save(tmp_path / "out" / FILE_NAME)
    return tmp_path / "out"


def told(command: Run, *arguments: object) -> dict[str, Any]:
    result = command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    return found


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_the_norm_of_a_correction_is_that_of_its_matrix(
    full: bool, moved: bool, experts: tuple[int, ...]
) -> None:
    own: dict[str, torch.Tensor] = {}
    if full:
        own["full"] = drawn(*experts, 5, 4)
    else:
        own |= {"left": drawn(*experts, 5, 2), "right": drawn(*experts, 2, 4)}
    if moved:
        own |= {"moved_left": drawn(*experts, 5, 3), "moved_right": drawn(*experts, 3, 4)}
    correction = Correction(**own)
    matrix = torch.zeros(*experts, 5, 4)
    correction.add_to(matrix)
    assert correction.norm() ** 2 == pytest.approx(matrix.double().square().sum().item())
    assert elements(correction) == matrix.numel()


def test_blocks_are_in_order_and_after_what_is_outside_of_them() -> None:
    found = by_layer([SECOND, FIRST, HEAD, "model.layers.2.k.weight"])
    assert list(found) == ["lm_head", "block 0", "block 2", "block 10"]


def test_inspect_tells_means_who_dominates_and_the_size_of_corrections(
    command: Run, saved: Path
) -> None:
    found = told(command, "inspect", saved)
    head, first, second = found["layers"]
    assert found["sources"] == list(SOURCES)
    assert head["means"] == pytest.approx([0.4, 0.6, 0.0], abs=1e-6)
    assert head["dominates"] == pytest.approx([1 / 3, 2 / 3, 0])
    assert first["dominates"] == [0, 1, 0]
    assert head["correction"] is None
    correction = Corrections.of_file(saved / CORRECTIONS_NAME).get(SECOND)
    assert correction is not None
    matrix = torch.zeros(4, 3)
    correction.add_to(matrix)
    assert second["correction"] == pytest.approx(math.sqrt(matrix.square().mean()))
    shown = command("inspect", saved / FILE_NAME)
    assert shown.exit_code == 0
    assert "b 67%" in shown.stdout
    assert "samples: 4" in shown.stdout


def test_inspect_reads_what_a_merge_writes(command: Run, merged: Merged) -> None:
    found = told(command, "inspect", merged.path)
    assert [layer["layer"] for layer in found["layers"]][-2:] == ["block 0", "block 1"]
    every = [t.mean(1).double() for t in merged.coefficients.coefficients.values()]
    assert found["means"] == pytest.approx(torch.stack(every).mean(0).tolist(), abs=1e-6)


def test_a_merge_does_not_differ_from_its_copy(
    command: Run, merged: Merged, tmp_path: Path
) -> None:
    shutil.copy(merged.path / FILE_NAME, tmp_path / FILE_NAME)
    found = told(command, "diff", merged.path, tmp_path)
    assert found["same"] is True
    assert found["layers"] == found["origin"] == []


def test_diff_tells_the_layers_that_differ_most_and_what_made_them_differ(
    command: Run, saved: Path, tmp_path: Path
) -> None:
    file = CoefficientFile.load(saved)
    tensors = dict(file.coefficients)
    tensors[FIRST] = tensors[FIRST] + 0.25
    tensors[SECOND] = tensors[SECOND].clone()
    tensors[SECOND][1, 2] += 0.9
    tensors["model.norm.weight"] = tensors[HEAD]
    order = [1, 0, 2]  # another order of the models does not count
    other = CoefficientFile(
        {name: tensor[order] for name, tensor in tensors.items()},
        tuple(SOURCES[index] for index in order),
        {"parameters": {"samples": 8}, "axes": {}},
    )
    other.save(tmp_path / "other" / FILE_NAME)
    found = told(command, "diff", saved, tmp_path / "other")
    assert [layer["layer"] for layer in found["layers"]] == ["block 10", "block 0"]
    assert found["layers"][0]["rms"] == pytest.approx(0.3)
    assert found["layers"][0]["largest"] == pytest.approx(0.9)
    assert found["layers"][1]["rms"] == pytest.approx(0.25)
    assert found["only"] == [[], ["model.norm.weight"]]
    assert ["parameters.samples", 4, 8] in found["origin"]
    assert (found["equal"], found["same"], found["corrections"]) == (1, False, [True, False])
    shown = command("diff", saved, tmp_path / "other")
    assert shown.exit_code == 0
    assert "parameters.samples: 4 -> 8" in shown.stdout


def test_merges_of_another_number_of_models_are_not_compared(
    command: Run, saved: Path, merged: Merged, tmp_path: Path
) -> None:
    two = CoefficientFile({HEAD: torch.ones(2, 3)}, ("org/a", "org/b"), {"axes": {}})
    two.save(tmp_path / "two" / FILE_NAME)
    result = command("diff", saved, tmp_path / "two")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "made from 2 models" in result.stderr
