"""The command `evaluate`: tables, JSON, comparisons, conditions, adapters, tasks."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.commands.conftest import Run
from tests.kit.adapters import save_adapter
from tests.kit.judged import LENGTH, save_model, save_texts
from tests.kit.merging import Merged, tensors_of

SHORT = ("--sequence-length", str(LENGTH), "--sequences", "5")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, seed=seed) for seed, name in enumerate("abc")}


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    one, other = save_texts(tmp_path)
    return [f"--data=counting={one}", f"--data={other}"]


def told(command: Run, *arguments: object) -> dict[str, Any]:
    result = command("evaluate", *arguments, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    return found


def test_it_prints_a_table_of_what_json_has(
    command: Run, models: dict[str, str], data: list[str]
) -> None:
    shown = command("evaluate", models["a"], models["b"], *data, *SHORT)
    assert shown.exit_code == 0, shown.output
    losses, perplexities = shown.stdout.split("\n\n")
    header, *rows = losses.splitlines()
    assert header.split() == ["nats", "per", "token", "counting", "prose", "mean"]
    found = told(command, models["a"], models["b"], *data)
    for row, entry in zip(rows, found["models"], strict=True):
        name, *numbers = row.replace("±", " ").split()
        assert name == Path(entry["model"]).name
        values = [*entry["loss"].values(), entry["mean"]]
        errors = [*entry["loss_error"].values(), entry["mean_error"]]
        pairs = zip(values, errors, strict=True)
        assert numbers == [f"{value:.3f}" for pair in pairs for value in pair]
    assert perplexities.startswith("perplexity")


def test_differences_are_from_the_baseline(
    command: Run, models: dict[str, str], data: list[str]
) -> None:
    found = told(command, models["a"], *data, "--baseline", models["b"])
    own, base = found["models"]
    assert (own["model"], base["model"]) == (models["a"], models["b"])
    for text in ("counting", "prose"):
        expected = own["loss"][text] - base["loss"][text]
        assert own["difference"][text] == pytest.approx(expected)
        assert own["difference_error"][text] > 0
        assert base["difference"][text] == 0


def average_of(models: dict[str, str], folder: Path, names: str) -> str:
    loaded = AutoModelForCausalLM.from_pretrained(models[names[0]])
    tensors = [tensors_of(Path(models[name])) for name in names]
    mean = {key: torch.stack([own[key] for own in tensors]).mean(0) for key in tensors[0]}
    loaded.load_state_dict(mean)
    loaded.save_pretrained(folder)
    for file in Path(models[names[0]]).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def test_recovery_is_measured_from_the_average_of_the_specialists(
    command: Run, models: dict[str, str], data: list[str], tmp_path: Path
) -> None:
    average = average_of(models, tmp_path / "average", "ab")
    references = [f"--reference=counting={models['a']}", f"--reference=prose={models['b']}"]
    found = told(command, f"merged={models['c']}", *data, *references)
    plain = told(command, models["a"], models["b"], models["c"], average, *data)
    a, b, merged, linear = (own["loss"] for own in plain["models"])
    own = {"counting": a["counting"], "prose": b["prose"]}
    for text, loss in own.items():
        expected = (
            (linear[text] - merged[text]) / (linear[text] - loss) if linear[text] > loss else None
        )
        measured = found["models"][0]["recovery"][text]
        assert measured is expected is None or measured == pytest.approx(expected, rel=1e-4)
    assert found["baseline"] == "linear"
    assert found["models"][1]["loss"] == pytest.approx(linear, rel=1e-5)
    assert found["reference_loss"] == pytest.approx(own)


def test_the_baseline_may_be_the_average_of_a_configuration(
    command: Run, models: dict[str, str], data: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "dam.yaml"
    entries = [
        {"model": models["a"], "parameters": {"calibration": "self", "weight": 1}},
        {"model": models["b"], "parameters": {"calibration": "self"}},
    ]
    file.write_text(
        yaml.safe_dump({"merge_method": "dam", "base_model": models["c"], "models": entries})
    )
    found = told(command, models["c"], *data, "--baseline", file)
    average = average_of(models, tmp_path / "average", "ab")
    expected = told(command, average, *data)["models"][0]["loss"]
    assert found["models"][1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_models_of_a_merge_are_averaged_by_its_own_configuration(
    command: Run, merged: Merged, calibration: tuple[Path, Path]
) -> None:
    result = command(
        "evaluate", merged.path, f"--data={calibration[0]}", "--baseline=linear", *SHORT
    )
    assert result.exit_code == 0, result.output
    assert "minus linear" in result.stdout


TWICE = {
    "models": (["x=a", "x=b"], "'x' is the name of two models: write another NAME="),
    "an average": (["linear=a", "--baseline=linear"], "'linear' is the name of the average"),
    "specialists": (
        ["a", "--reference=prose=a", "--reference=prose=b"],
        "two specialists of the text 'prose'",
    ),
}


@pytest.mark.parametrize("what", TWICE, ids=str)
def test_one_name_is_one_thing(
    what: str,
    command: Run,
    models: dict[str, str],
    data: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(models["a"]).parent)
    given, message = TWICE[what]
    result = command("evaluate", *given, *data)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_model_that_is_named_twice_is_judged_once(
    command: Run, models: dict[str, str], data: list[str]
) -> None:
    found = told(command, models["a"], models["a"], *data)
    assert [own["model"] for own in found["models"]] == [models["a"]]


def test_without_models_to_average_the_ways_to_name_them_are_told(
    command: Run, models: dict[str, str], data: list[str]
) -> None:
    result = command("evaluate", models["a"], *data, "--baseline", "linear")
    assert result.exit_code == 2
    assert "required the models to average: two --reference" in result.stderr


def test_a_condition_that_holds_gives_exit_code_1_after_the_numbers(
    command: Run, models: dict[str, str], data: list[str]
) -> None:
    arguments = ("evaluate", f"x={models['a']}", *data, *SHORT, "--fail-if", "counting > 0.1")
    shown, in_json = command(*arguments), command(*arguments, "--json")
    assert shown.exit_code == in_json.exit_code == 1
    assert "failed: x: loss counting is" in shown.stderr
    assert shown.stdout.startswith("nats per token")
    assert len(json.loads(in_json.stdout)["failed"]) == 1
    fine = command(*arguments[:-1], "counting < 0.1")
    assert (fine.exit_code, fine.stderr) == (0, "")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_an_adapter_is_judged_as_the_model_that_it_makes(
    command: Run, models: dict[str, str], data: list[str], tmp_path: Path
) -> None:
    adapter = save_adapter(Path(models["a"]), tmp_path / "adapter")
    import peft

    base: Any = AutoModelForCausalLM.from_pretrained(models["a"])
    whole = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    for file in Path(models["a"]).glob("tokenizer*"):
        (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
    names = (f"{models['a']}+{adapter}", adapter, tmp_path / "whole", models["a"])
    both, alone, expected, without = (own["loss"] for own in told(command, *names, *data)["models"])
    assert both == alone == pytest.approx(expected, rel=1e-6)
    assert both != pytest.approx(without, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--reference", "counting"), 2, "required NAME=MODEL"),
        (("--reference", "x=org/a"), 2, "there is no text 'x' among counting, prose"),
        (("--reference", "prose=./gone"), 1, "the model ./gone does not exist"),
        (("--baseline", "./gone"), 1, "the model ./gone does not exist"),
        (("--tasks", "arc_easy"), 1, "pip install 'mergekit-dam[tasks]'"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_read(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    command: Run,
    models: dict[str, str],
    data: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it would fail
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    result = command("evaluate", models["a"], *data, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.split())


def test_tasks_are_handed_over_to_lm_eval(
    command: Run, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the signature of lm-eval 0.4.13, whose result has this form."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        asked.append(given)
        return {"results": {"easy": {"alias": "easy", "acc,none": 0.5, "acc_stderr,none": 0.1}}}

    class TaskManager:
        def __init__(self, include_path: list[str] | None = None) -> None:
            self.include_path = include_path

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.__spec__ = importlib.util.spec_from_loader("lm_eval", None)
    vars(package)["simple_evaluate"], vars(tasks)["TaskManager"] = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    shown = command("evaluate", f"x={models['a']}", "--tasks", "easy", "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[-1].split() == ["x", "0.500"]
    assert asked[0]["model_args"]["pretrained"] == models["a"]
    assert (asked[0]["tasks"], asked[0]["device"]) == (["easy"], "cpu")
    found = told(command, f"x={models['a']}", "--tasks", "easy")
    assert found["tasks"] == {"x": {"easy": {"acc": 0.5, "acc_stderr": 0.1}}}
