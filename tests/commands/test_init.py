"""`init`: what it writes passes the checks of a merge, and says what it could not keep."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_dam.request.check import Checked, check_configuration
from mergekit_dam.request.document import single
from tests.commands.conftest import Run
from tests.kit.models import Models

PLAIN = "models: [{model: org/a}, {model: org/b}]"
WITH_BASE = f"base_model: org/base\n{PLAIN}"
SLICES = """
slices:
- sources:
  - {model: org/a, layer_range: [0, 8]}
  - {model: org/b, layer_range: [0, 8]}
"""

CONFIGURATIONS = {
    "linear": "models: [{model: org/a, parameters: {weight: 0.3}}, {model: org/b}]\n"
    "parameters: {normalize: true}",
    "ties": "base_model: org/base\nmodels:\n- {model: org/base}\n"
    "- {model: org/a, parameters: {density: 0.5, weight: 0.5}}\n"
    "- {model: org/b, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}\n"
    "parameters: {normalize: true, int8_mask: true}\ndtype: float16",
    "dare_ties": f"{WITH_BASE}\nparameters: {{density: 0.53, weight: -0.3, rescale: true}}",
    "task_arithmetic": f"{WITH_BASE}\nparameters: {{weight: {{filter: mlp, value: 0.3}}}}",
    "model_stock": f"{WITH_BASE}\ntokenizer: {{source: union}}\nchat_template: auto",
    "slerp": f"base_model: org/a{SLICES}parameters:\n  t:\n"
    "  - {filter: self_attn, value: [0, 0.5, 1]}\n  - value: 0.5",
    "nuslerp": f"{PLAIN}\nparameters: {{nuslerp_row_wise: true}}\ntokenizer_source: base",
    "passthrough": "slices:\n- sources: [{model: org/a, layer_range: [0, 8]}]\n"
    "- sources: [{model: org/b, layer_range: [4, 12], parameters: {scale: 0.5}}]",
    "sce": f"{WITH_BASE}\nparameters: {{select_topk: 0.1}}\ndtype: bf16\nnonsense: 1",
    "linear ": "base_model: org/base" + SLICES,
    "multislerp": "modules:\n  default:\n    models: [{model: org/a}, {model: org/b}]",
    "dam": "models: [{model: org/a, parameters: {loss_weight: 2}}, {model: org/b}]\n"
    "parameters: {samples: 8, ridge: 0.1}",
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Some text.\n")
    return file


def checked(content: str) -> Checked:
    document = single(content)
    config = MergeConfiguration.model_validate(document.tree)
    return check_configuration(config, document, texts=True)


def converted(command: Run, folder: Path, text: Path, method: str) -> tuple[Checked, Any, Any]:
    """What is checked of the configuration that is made of one of `CONFIGURATIONS`."""
    source, out = folder / "other.yml", folder / "dam.yaml"
    source.write_text(f"merge_method: {method.strip()}\n{CONFIGURATIONS[method]}\n")
    result = command("init", "--from", source, f"a={text}", "b=self", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    content = out.read_text("utf-8")
    assert yaml.safe_load(content) | {"parameters": None} == told["configuration"] | {
        "parameters": None
    }
    for said in (*told["changed"], *told["not_kept"]):
        assert said.split("`")[1] in content  # the file says it, too
    return checked(content), told, yaml.safe_load(content)


@pytest.mark.parametrize("method", [name for name in CONFIGURATIONS if name != "slerp"])
def test_a_configuration_of_any_method_becomes_one_that_passes_the_checks(
    method: str, command: Run, tmp_path: Path, text: Path
) -> None:
    found, told, tree = converted(command, tmp_path, text, method)
    assert [str(model) for model in found.models] == ["org/a", "org/b"]
    assert {str(m): t for m, t in found.calibrations.items()} == (
        {"org/a": str(text), "org/b": "self"} if found.learns else {}
    )
    source = yaml.safe_load(CONFIGURATIONS[method])
    for key in ("tokenizer", "tokenizer_source", "chat_template", "slices"):
        assert (key in tree) == (key in source)
    assert bool(told["changed"]) == (method != "dam")


def test_every_parameter_of_another_method_is_named(
    command: Run, tmp_path: Path, text: Path
) -> None:
    _, told, _ = converted(command, tmp_path, text, "ties")
    for lost in ("density: 0.5", "density: [1, 0.7, 0.1]", "weight: 0.5", "normalize: True"):
        assert sum(f"`{lost}`" in said for said in told["not_kept"]) == 1
    assert len(told["not_kept"]) == 6


def test_weights_of_linear_are_kept_as_the_average_to_start_from(
    command: Run, tmp_path: Path, text: Path
) -> None:
    _, _, tree = converted(command, tmp_path, text, "linear")
    assert tree["models"][0]["parameters"] == {"weight": 0.3, "calibration": str(text)}


def test_of_two_models_of_which_one_is_the_base_both_are_merged(
    command: Run, tmp_path: Path, text: Path
) -> None:
    found, told, tree = converted(command, tmp_path, text, "slerp")
    assert tree["parameters"]["include_base"] is True
    assert {str(model) for model in found.models} == {"org/a", "org/b"}
    assert any("include_base" in said for said in told["changed"])


def test_settings_of_dam_stay(command: Run, tmp_path: Path, text: Path) -> None:
    found, told, tree = converted(command, tmp_path, text, "dam")
    assert (found.run.samples, tree["parameters"]["ridge"]) == (8, 0.1)
    assert told["not_kept"] == []


def test_names_and_texts_make_a_configuration_with_comments(
    command: Run, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "dam.yaml"
    result = command("init", f"org/a={text}:samples=4", "org/b=self", "--base", "org/c", "-o", out)
    assert result.exit_code == 0, result.output
    assert "Next: mergekit-dam plan" in result.stderr
    content = out.read_text("utf-8")
    assert content.count("# ") > 5
    found = checked(content)
    assert str(found.base) == "org/c"
    assert list(found.calibrations.values()) == [f"{text}:samples=4", "self"]


def test_it_prints_on_stdout_what_it_would_write(command: Run, tmp_path: Path, text: Path) -> None:
    arguments = ("init", f"org/a={text}", "org/b=self")
    command(*arguments, "-o", tmp_path / "dam.yaml")
    printed = command(*arguments, "-o", "-")
    assert printed.stdout == (tmp_path / "dam.yaml").read_text("utf-8")


def test_what_it_writes_can_be_planned(
    command: Run, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]
) -> None:
    out = tmp_path / "dam.yaml"
    pairs = zip(llama_models.models, calibration, strict=True)
    texts = [f"{model}={text}:samples=4" for model, text in pairs]
    assert command("init", *texts, "--base", llama_models.base, "-o", out).exit_code == 0
    content = out.read_text("utf-8").replace("sequence_length: 512", "sequence_length: 16")
    out.write_text(content, encoding="utf-8")
    result = command("plan", out, "--gpu", "h100")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "required MODEL=TEXT for each model, or --from FILE"),
        (("org/a",), 2, "required MODEL=TEXT, such as org/math=data/math.jsonl, got 'org/a'"),
        (("org/a=self", "org/a=self"), 2, "org/a is there twice"),
        (("org/a=self", "org/b=gone.jsonl"), 1, "calibration of org/b: 'gone.jsonl': no file"),
        (("org/a=self", "--base", "org/c"), 1, "org/a alone would be merged"),
        (("--from", "{ties}", "a=self"), 1, "none was given for org/b: add `org/b=TEXT`"),
        (("--from", "{ties}", "a=self", "c=self"), 1, "c names none of the models: org/a, org/b"),
        (("--from", "{ties}", "--base", "x/y"), 2, "the base is that of the file"),
        (("--from", "{bad}", "a=self"), 1, "models[0]: required `model`"),
        (("org/a=self", "org/b=self", "-o", "{ties}"), 2, "exists; give another with -o"),
        (("org/a=self", "org/b=self", "-o", "no/such/x.yml"), 2, "does not exist; make it first"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(
    arguments: tuple[str, ...], code: int, message: str, command: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("ties.yml").write_text(f"merge_method: ties\n{CONFIGURATIONS['ties']}\n")
    Path("bad.yml").write_text("merge_method: ties\nmodels:\n- {name: org/a}\n")
    result = command("init", *(own.format(ties="ties.yml", bad="bad.yml") for own in arguments))
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yml", "ties.yml"]
