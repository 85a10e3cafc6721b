"""A calibration may be an entry of axolotl or a list, wherever a text may stand."""

from typing import Any

import pytest
from mergekit.common import ModelReference

from mergekit_dam.errors import ConfigError
from mergekit_dam.host import plugin
from mergekit_dam.request.check import check_configuration
from mergekit_dam.request.entries import without_entries
from tests.kit.configurations import check, configuration, model

ENTRY = {"path": "org/chat", "type": "chat_template", "split": "train"}


def values(first: Any, method: str = "dam", shared: Any = None) -> dict[str, Any]:
    models: list[dict[str, Any]] = [{"model": "a", "parameters": {"calibration": first}}]
    models.append({"model": "b"})
    return {
        "merge_method": method,
        "models": models,
        "parameters": {"calibration": shared or "b.jsonl"},
    }


def test_mergekit_reads_an_entry_as_a_text() -> None:
    plugin.install()
    from mergekit.config import MergeConfiguration

    config = MergeConfiguration.model_validate(values(["a.txt", ENTRY], shared=ENTRY))
    checked = check_configuration(config)
    text = "org/chat:format=messages:split=train"
    assert list(checked.calibrations.values()) == [("a.txt", text), text]


def test_a_list_of_sources_is_shared_by_models_without_their_own() -> None:
    text = configuration(
        models=model("{calibration: c.txt}").replace("b.jsonl", "[b.jsonl, x.txt]")
        + "\n    - model: org/c",
        parameters="{calibration: [a.jsonl, 'org/chat:samples=64']}",
    )
    by_model = {str(name): value for name, value in check(text).calibrations.items()}
    assert by_model == {
        "org/a": "c.txt",
        "org/b": ("b.jsonl", "x.txt"),
        "org/c": ("a.jsonl", "org/chat:samples=64"),
    }


def test_every_bad_entry_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        without_entries(values({"type": "alpaca"}, shared=[{"path": "a", "shards": 2}]))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "models[0].parameters.calibration",
        "parameters.calibration[0]",
    ]


def test_a_filter_is_left_to_the_checks_and_other_values_are_the_same() -> None:
    given = values({"value": "a", "filter": "mlp"})
    assert without_entries(given) == given


def test_one_calibration_in_two_slices_may_be_a_list() -> None:
    source = {"model": "a", "layer_range": [0, 1], "parameters": {"calibration": ["x", "y"]}}
    other = {**source, "model": "b", "parameters": {"calibration": "z"}}
    plugin.install()
    from mergekit.config import MergeConfiguration

    slices = [
        {"sources": [{**own, "layer_range": span} for own in (source, other)]}
        for span in ([0, 1], [1, 2])
    ]
    config = MergeConfiguration.model_validate({"merge_method": "dam", "slices": slices})
    calibrations = check_configuration(config).calibrations
    assert calibrations[ModelReference.model_validate("a")] == ("x", "y")
