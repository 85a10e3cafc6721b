"""`merge` and `plan` from Python: the same merge as the command's, and texts in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit.config import MergeConfiguration

import mergekit_dam
from mergekit_dam import DamError
from mergekit_dam.estimate import report as estimates
from tests.api.conftest import CONFIGURATION, NAMES

WEIGHTS = "model.safetensors"


def documents(name: str) -> list[str]:
    """The documents of a text, from memory."""
    lines = Path(f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def same(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def tree() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path("dam.yaml").read_text("utf-8"))
    return found


def test_all_forms_of_a_configuration_make_the_same_merge(folder: Path) -> None:
    with_paths = tree()
    for entry in with_paths["models"]:
        entry["model"] = Path(entry["model"])
    forms: dict[str, Any] = {
        "dict": with_paths,
        "object": MergeConfiguration.model_validate(tree()),
    }
    for name, form in forms.items():
        assert mergekit_dam.merge(form, name) == Path(name)
        assert same(Path(name), folder / "merged"), name


def test_texts_in_memory_merge_as_the_same_texts_in_files(folder: Path) -> None:
    texts = {name: documents(name) for name in NAMES}
    out = mergekit_dam.merge(CONFIGURATION, "out", texts=texts)
    assert same(out, folder / "merged")
    given: Any = {"models/math": Path("math.jsonl"), "animals": "animals.jsonl"}
    assert same(mergekit_dam.merge(CONFIGURATION, "mixed", texts=given), folder / "merged")


def test_what_is_written_of_texts_in_memory_is_the_same_each_time(folder: Path) -> None:
    texts = {name: documents(name) for name in NAMES}
    outs = [mergekit_dam.merge(CONFIGURATION, name, texts=texts) for name in ("a/m", "b/m")]
    for name in (WEIGHTS, "dam_coefficients.safetensors", "mergekit_config.yml", "README.md"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    assert "memory/math.jsonl" in (outs[0] / "mergekit_config.yml").read_text("utf-8")
    for file in outs[0].iterdir():
        assert b"mergekit-dam-" not in file.read_bytes(), file.name  # the temporary folder


def test_a_merge_from_python_sees_models_that_changed_since_the_last(folder: Path) -> None:
    first = mergekit_dam.merge("dam.yaml", "first")
    weights = folder / "models/math" / WEIGHTS
    weights.write_bytes((folder / "models/animals" / WEIGHTS).read_bytes())
    assert not same(mergekit_dam.merge("dam.yaml", "second"), first)


def test_a_plan_is_that_of_the_file_whatever_the_form(folder: Path) -> None:
    def counted(found: Any) -> Any:
        made = estimates.to_json(found)
        return [made[key] for key in ("tensors", "sweeps")] if "tensors" in made else made["sweeps"]

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if "seconds" not in k}
        return [*map(without_times, value)] if isinstance(value, list) else value

    of_file = mergekit_dam.plan("dam.yaml", gpu="h100")
    texts = {name: documents(name) for name in NAMES}
    of_memory = mergekit_dam.plan(CONFIGURATION, texts=texts, gpu="h100")
    assert without_times(counted(of_file)) == without_times(counted(of_memory))
    assert of_file.problems == ()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such file": ({"configuration": "absent.yaml"}, "absent.yaml"),
    "no configuration": ({"configuration": 3}, "a mapping or a MergeConfiguration, got int"),
    "another method": ({"configuration": {"merge_method": "ties"}}, "`merge_method: dam`, got"),
    "no plain value": ({"configuration": {"merge_method": "dam", "x": object()}}, "plain values"),
    "a text of no model": ({"texts": {"german": ["ein Satz"]}}, "german names none of the models"),
    "text of no strings": ({"texts": {"math": [1, 2]}}, "a list of strings, a document each"),
    "an empty text": ({"texts": {"math": ["", " "]}}, "2 without a word"),
    "half a character": ({"texts": {"math": ["a\ud800"]}}, "cannot be written as UTF-8"),
    "no text": ({}, "calibration"),
    "no option": ({"bits": 4}, "mergekit has no option bits"),
    "a wrong value": ({"num_threads": "many"}, "option num_threads"),
}


@pytest.mark.parametrize("given", REFUSED, ids=str)
def test_what_is_wrong_is_a_dam_error_and_nothing_is_written(given: str, folder: Path) -> None:
    arguments, message = REFUSED[given]
    configuration = {"configuration": CONFIGURATION, **arguments}
    with pytest.raises(DamError) as error:
        mergekit_dam.merge(out="out", **configuration)
    assert message in str(error.value)
    assert not Path("out").exists()


def test_a_gpu_that_is_not_known_is_refused_with_those_that_are(folder: Path) -> None:
    with pytest.raises(DamError, match=r"required one of .*h100.*, got 'h999'"):
        mergekit_dam.plan("dam.yaml", gpu="h999")
