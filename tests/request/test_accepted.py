"""Configurations that are accepted, and what they say."""

from typing import Any

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_dam.errors import ConfigError
from mergekit_dam.request.check import check_configuration
from mergekit_dam.request.document import Document
from tests.kit.configurations import MODELS, check, configuration, model, refs, sliced


def test_the_shortest_configuration_is_accepted() -> None:
    checked = check(configuration())
    assert checked.models == refs("org/a", "org/b")
    assert checked.base is None
    assert dict(zip(refs("org/a", "org/b"), ("a.jsonl", "b.jsonl"), strict=True)) == dict(
        checked.calibrations
    )
    assert checked.run.samples == 32


@pytest.mark.parametrize(
    "parameters",
    [
        "{ridge: 1e-3}",  # YAML 1.1 reads a string
        "{ridge: 1.0e-3, temperature: '2'}",
        "{ridge: [{filter: mlp, value: 1e-2}, {value: 0.1}]}",
        "{ridge: {filter: mlp, value: [0.1, 1]}}",
        "{ridge: [0.1, 1e-2, 1]}",
        "{granularity: [tensor, column]}",
        "{sum_to_one: [{filter: self_attn, value: false}]}",
        "{loss_weight: [1, 2], weight: [{filter: mlp, value: 2}]}",
        "{samples: '64', holdout: 0, seed: 7}",
        "{norms: false, head: off, embeddings: no}",
    ],
)
def test_every_form_of_value_that_mergekit_knows_is_accepted(parameters: str) -> None:
    check(configuration(parameters=parameters))


def test_run_parameters_are_converted() -> None:
    run = check(configuration(parameters="{samples: '64', temperature: 2e0, holdout: 0}")).run
    assert (run.samples, run.temperature, run.holdout) == (64, 2.0, 0.0)


def test_one_calibration_at_top_level_is_for_every_model_that_has_none() -> None:
    text = configuration(
        models="[{model: org/a}, {model: org/b, parameters: {calibration: b}}]",
        parameters="{calibration: all}",
    )
    assert list(check(text).calibrations.values()) == ["all", "b"]


def test_a_model_whose_data_does_not_count_needs_no_calibration() -> None:
    checked = check(configuration(models=model("{loss_weight: 0}")))
    assert checked.models == refs("org/a", "org/b")
    assert list(checked.calibrations) == list(refs("org/b"))


def test_calibration_of_a_model_whose_data_does_not_count_is_not_read() -> None:
    checked = check(configuration(models=model("{loss_weight: 0, calibration: missing.txt}")))
    assert list(checked.calibrations) == list(refs("org/b"))


def test_the_base_is_no_model_to_merge_unless_included() -> None:
    plain = check(configuration(models=MODELS + "- model: org/base\n", base="org/base"))
    assert plain.models == refs("org/a", "org/b")
    assert plain.base == refs("org/base")[0]
    models = MODELS + "- {model: org/base, parameters: {calibration: c, weight: 2}}\n"
    included = check(
        configuration(models=models, base="org/base", parameters="{include_base: true}")
    )
    assert included.models == refs("org/a", "org/b", "org/base")
    assert len(included.calibrations) == 3


def test_an_included_base_that_is_not_listed_takes_the_calibration_of_all() -> None:
    text = configuration(
        base="org/base", parameters="{include_base: true, calibration: all, samples: 3}"
    )
    assert list(check(text).calibrations.values()) == ["a.jsonl", "b.jsonl", "all"]


def test_a_replay_needs_no_calibration() -> None:
    text = configuration(
        models="[{model: org/a}, {model: org/b}]", parameters="{coefficients: out}"
    )
    checked = check(text)
    assert checked.run.coefficients == "out"
    assert not checked.calibrations


def test_slices_of_all_models_are_accepted() -> None:
    checked = check(
        sliced(
            """
            - parameters: {ridge: 0.1}
              sources:
              - {model: org/a, layer_range: [0, 1], parameters: {calibration: a}}
              - {model: org/b, layer_range: [0, 1], parameters: {calibration: b}}
            - sources:
              - {model: org/b, layer_range: [1, 2], parameters: {calibration: b}}
              - {model: org/a, layer_range: [1, 2]}
            """
        )
    )
    assert checked.models == refs("org/a", "org/b")
    assert list(checked.calibrations.values()) == ["a", "b"]


def test_without_the_yaml_the_parsed_configuration_is_checked_alone() -> None:
    source: dict[str, Any] = yaml.safe_load(configuration(more="dam: {samples: 3}"))
    config = MergeConfiguration.model_validate(source)
    assert check_configuration(config).models == refs("org/a", "org/b")


def test_problems_of_settings_and_of_models_are_reported_together() -> None:
    source = {
        "merge_method": "dam",
        "parameters": {"smaples": 4, "include_base": True},
        "models": [{"model": "a", "parameters": {"weight": -1, "calibration": "a.txt"}}],
    }
    with pytest.raises(ConfigError) as caught:
        check_configuration(MergeConfiguration.model_validate(source), Document(source))
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for part in ("did you mean `samples`", "`weight` is -1", "names no `base_model`"):
        assert part in told
