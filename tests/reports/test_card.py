"""The model card: metadata that the Hub takes, results, and no path of this machine."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration

from mergekit_dam.host.card import hub_ids
from mergekit_dam.reports.card import complete_card, without_paths
from tests.kit.reports import SOURCES, report_values, trial

HOME = "/home/some one/models"
CONFIGURATION = f"""\
# made in /home/someone/secret/place, see https://example.com/a/b
merge_method: dam
base_model: org/base
models:
- model: {HOME}/python
  parameters: {{calibration: ["{HOME}/text/python.jsonl:samples=3", org/chats]}}
- model: org/math
  parameters: {{calibration: ./data/math.jsonl}}
- model: "{HOME}/large+{HOME}/adapter"
  parameters: {{calibration: "~/data/words.jsonl:chat_template={HOME}/template.jinja"}}
"""


def completed(folder: Path, values: dict[str, Any], ids: list[str] | None = None) -> ModelCard:
    """The card of a folder in which mergekit wrote one."""
    config = MergeConfiguration.model_validate(yaml.safe_load(CONFIGURATION))
    text = generate_card(config, CONFIGURATION, "out")
    (folder / "README.md").write_text(text, "utf-8")
    (folder / "dam_report.json").write_text(json.dumps(values), "utf-8")
    complete_card(folder, ["org/base", "org/math", "org/base"] if ids is None else ids)
    return ModelCard((folder / "README.md").read_text("utf-8"))


def test_metadata_is_in_the_form_of_the_hub(tmp_path: Path) -> None:
    values = report_values(2)
    for model, dataset in (("org/math", "org/texts"), ("org/german", "org/texts")):
        values["calibration"][model]["dataset"] = dataset
    values["calibration"]["org/python"]["parts"] = [{"dataset": "org/chats"}, {"dataset": None}]
    completed(tmp_path, values)
    _, header, _ = (tmp_path / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": ["org/base", "org/math"],
        "base_model_relation": "merge",
        "datasets": ["org/chats", "org/texts"],
        "library_name": "transformers",
        "tags": ["mergekit", "merge", "dam"],
    }


def test_without_anything_on_the_hub_no_key_is_empty(tmp_path: Path) -> None:
    data = completed(tmp_path, report_values(2), []).data.to_dict()
    assert not {"base_model", "datasets", "license"} & data.keys()


def test_the_licence_is_left_to_the_user_with_a_reminder(tmp_path: Path) -> None:
    assert re.search(r"<!-- .*`license:`.* -->", completed(tmp_path, report_values(2)).text)


def test_mergekits_headings_stay_in_their_order(tmp_path: Path) -> None:
    before, _, after = completed(tmp_path, report_values(2)).text.partition("```yaml\n")
    text = before + after.partition("```")[2]
    headings = re.findall(r"^#+ .*$", text, re.MULTILINE)
    assert headings == [
        "# out",
        "## Merge Details",
        "### Merge Method",
        "### Models Merged",
        "### Results",
        "### Coefficients",
        "### Calibration Data",
        "### Configuration",
        "### Reproduce",
        "### Citation",
    ]


def test_results_are_those_of_the_report(tmp_path: Path) -> None:
    text = completed(tmp_path, report_values(2)).text
    assert "| python | 0.9000 | 0.5000 | −44 % | 2,048 |" in text  # noqa: RUF001
    assert "| math | words.jsonl | 32 | 16,384 | 2,048 |" in text
    assert "12 weights have a correction of rank 64" not in text
    assert "14 weights have a correction of rank 64" in text
    assert "@article{gauthiercaron2024merging," in text
    assert text.count("```") % 2 == 0


def test_the_picture_stands_beside_the_card(tmp_path: Path) -> None:
    text = completed(tmp_path, report_values(2)).text
    (named,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert (tmp_path / named).read_text("utf-8").startswith("<svg")


def test_no_path_of_this_machine_is_told(tmp_path: Path) -> None:
    completed(tmp_path, report_values(2, [f"{HOME}/python", *SOURCES[1:]]))
    for file in (tmp_path / "README.md", tmp_path / "dam_coefficients.svg"):
        text = file.read_text("utf-8")
        assert "/home" not in text, file
        assert "~/" not in text, file
        assert "some one" not in text, file


def test_names_and_relative_paths_stay_in_the_configuration(tmp_path: Path) -> None:
    text = completed(tmp_path, report_values(2)).text
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown["base_model"] == "org/base"
    assert [own["model"] for own in shown["models"]] == ["python", "org/math", "large+adapter"]
    assert [own["parameters"]["calibration"] for own in shown["models"]] == [
        ["python.jsonl:samples=3", "org/chats"],
        "./data/math.jsonl",
        "words.jsonl:chat_template=template.jinja",
    ]
    assert "# made in place, see https://example.com/a/b" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (r"C:\Users\me\model", "model"),
        ("[/a/x/model, /a/y/model]", "[x/model, y/model]"),
        ("org/model", "org/model"),
        ("../model", "../model"),
        ("</s>", "</s>"),
    ],
)
def test_absolute_paths_become_their_ends(value: str, shown: str) -> None:
    text = f"```yaml\nmodel: {value}\n```\n"
    assert without_paths(text, text) == text.replace(value, shown)


def test_a_merge_that_only_copied_says_so(tmp_path: Path) -> None:
    values = {**report_values(2), "search": [], "calibration": {}}
    for own in values["tensors"]:
        own["outcome"] = "copied: of one model alone"
        own.pop("correction", None)
    text = completed(tmp_path, values).text
    assert "Every tensor is a copy of one model's" in text
    assert "### Calibration Data" not in text
    assert "have a correction" not in text
    assert "dam_coefficients.safetensors" not in text


def test_one_model_needs_no_mean(tmp_path: Path) -> None:
    values = report_values(2)
    values["calibration"] = {"org/math": values["calibration"]["org/math"]}
    values["search"] = [trial("start", True, [0.9]), trial("layer, identity", True, [0.3])]
    text = completed(tmp_path, values).text
    assert "| math | 0.9000 | 0.3000 |" in text
    assert "all, by weight" not in text


def test_the_lock_is_named(tmp_path: Path) -> None:
    assert "`dam_lock.json` pins" in completed(tmp_path, report_values(1)).text


def test_a_card_that_cannot_be_completed_stays_and_does_not_undo_a_merge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    completed(tmp_path, report_values(1))
    written = (tmp_path / "README.md").read_bytes()
    (tmp_path / "dam_report.json").write_text("{}", "utf-8")
    with caplog.at_level(logging.WARNING):
        complete_card(tmp_path, [])
    assert "README.md stays as mergekit has written it" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == written


def test_a_card_is_completed_alike_every_time(tmp_path: Path) -> None:
    first = str(completed(tmp_path, report_values(2)))
    assert str(completed(tmp_path, report_values(2))) == first


def test_folders_are_no_ids_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "dam",
            "models": [
                {"model": "models/a"},
                {"model": str(tmp_path)},
                {"model": "org/model@main+org/adapter"},
                {"model": "./models/b"},
                {"model": "gpt2"},
            ],
        }
    )
    models = [entry.model for entry in config.models or []]
    assert hub_ids(models) == ["org/model", "org/adapter", "gpt2"]
