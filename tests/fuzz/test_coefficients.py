"""Files of coefficients and corrections of any content are refused in our words, or they work."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mergekit_dam.cli import main
from mergekit_dam.coefficients.correction import Correction, Corrections
from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME, CoefficientFile
from mergekit_dam.coefficients.shapes import correction_problem, stored_shapes
from mergekit_dam.inspection.difference import compared
from mergekit_dam.inspection.summary import summarised
from tests.kit.damage import changed, changed_safetensors, safetensors_bytes
from tests.kit.guard import guarded

pytestmark = pytest.mark.slow

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = (3, 4)


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small merge with corrections."""
    folder = tmp_path_factory.mktemp("merge")
    corrections = Corrections(folder / "own")
    corrections.put(NAME, Correction(left=torch.ones(3, 1), right=torch.ones(1, 4)))
    digest = corrections.save(folder / CORRECTIONS_NAME)
    metadata = {
        "axes": {"model.embed_tokens.weight": 0},
        "corrections": digest,
        "identities": {"org/a": {"model.safetensors": 64 * "a"}},
        "parameters": {"samples": 4},
        "revisions": {"org/a": "main"},
        "versions": {"mergekit-dam": "0.2.0"},
        "calibration_sha256": {"org/a": 64 * "b"},
    }
    rows = {NAME: torch.full((2, 4), 0.5), "model.embed_tokens.weight": torch.full((2, 1), 0.5)}
    CoefficientFile(rows, ("org/a", "org/b"), metadata).save(folder / FILE_NAME)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write(folder: Path, files: dict[str, bytes], **changes: bytes) -> Path:
    folder.mkdir()
    for name, content in {**files, **changes}.items():
        (folder / name).write_bytes(content)
    return folder


@given(data=st.data())
def test_a_changed_file_of_coefficients(merge: dict[str, bytes], data: st.DataObject) -> None:
    content = data.draw(changed_safetensors(merge[FILE_NAME]))
    with guarded() as folder:
        good = write(folder / "good", merge)
        bad = write(folder / "bad", {**merge, FILE_NAME: content})
        file = CoefficientFile.load(bad)
        assert all(rows.isfinite().all() for rows in file.coefficients.values())
        assert {len(rows) for rows in file.coefficients.values()} == {len(file.sources)}
        file.save(folder / "again" / FILE_NAME)
        summarised(bad)
        compared(bad, good)
        compared(good, bad)


@given(data=st.data())
def test_changed_metadata_that_the_commands_print(
    merge: dict[str, bytes], data: st.DataObject
) -> None:
    content = merge[FILE_NAME]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    ((key, text),) = header["__metadata__"].items()
    told = {**data.draw(changed(json.loads(text)))}
    header["__metadata__"][key] = json.dumps(told)
    with guarded() as folder:
        own = safetensors_bytes(header, content[8 + length :])
        good = write(folder / "good", merge)
        bad = write(folder / "bad", {**merge, FILE_NAME: own})
        for command in (["inspect", bad], ["diff", bad, good], ["diff", good, bad]):
            for more in ([], ["--json"]):
                done = CliRunner().invoke(main, [*map(str, command), *more])
                assert done.exit_code in (0, 1)
                assert "not expected" not in done.output
                assert done.exception is None or isinstance(done.exception, SystemExit)


@given(data=st.data())
def test_a_changed_file_of_corrections(merge: dict[str, bytes], data: st.DataObject) -> None:
    content = data.draw(changed_safetensors(merge[CORRECTIONS_NAME]))
    with guarded() as folder:
        bad = write(folder / "bad", {**merge, CORRECTIONS_NAME: content})
        found = CoefficientFile.load(bad)
        assert found.corrections is not None
        summarised(bad)
        for own in stored_shapes(found.corrections).values():
            if correction_problem(own, SHAPE) is None:
                correction = Corrections.of_file(found.corrections).get(NAME)
                assert correction is not None
                correction.add_to(torch.zeros(SHAPE))


@given(data=st.data())
def test_corrections_of_any_names_and_shapes_that_have_the_right_digest(
    merge: dict[str, bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fields = st.sampled_from(["full", "left", "right", "moved_left", "moved_right", "x"])
    shapes = st.lists(st.integers(0, 3), max_size=4)
    own = data.draw(st.dictionaries(st.tuples(st.sampled_from([NAME, "w"]), fields), shapes))
    header, size = {}, 0
    for (name, field), shape in own.items():
        end = size + 4 * torch.Size(shape).numel()
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}
        header[f"{name}.{field}"], size = entry, end
    payload = bytes(size)
    import hashlib

    digest = hashlib.sha256(payload).hexdigest()
    header["__metadata__"] = {"mergekit_dam": digest}
    rows = {NAME: torch.full((2, 4), 0.5), "w": torch.full((2, 1), 0.5)}
    with guarded() as folder:
        (folder / CORRECTIONS_NAME).write_bytes(safetensors_bytes(header, payload))
        file = CoefficientFile(rows, ("org/a", "org/b"), {"corrections": digest})
        file.save(folder / FILE_NAME)
        summarised(folder)
