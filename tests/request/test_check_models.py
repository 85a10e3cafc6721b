"""Every way in which the models of a configuration can be wrong."""

import pytest

from mergekit_dam.errors import DamError
from tests.kit.configurations import (
    MODELS,
    check,
    configuration,
    model,
    module,
    only_problem,
    problems,
    refs,
    sliced,
)


def test_calibration_of_a_slice_is_refused() -> None:
    text = sliced(
        """
        - parameters: {calibration: a.jsonl}
          sources:
          - {model: org/a, layer_range: [0, 2], parameters: {calibration: a}}
        """
    )
    assert only_problem(text) == (
        "slices[0]: `calibration` belongs to a model (or to all, at top level), not to a slice"
    )


@pytest.mark.parametrize("setting", ["[1, 2]", "{filter: mlp, value: a.jsonl}"])
def test_a_gradient_or_filter_for_calibration_is_refused(setting: str) -> None:
    problem = only_problem(configuration(models=model(f"{{calibration: {setting}}}")))
    assert problem == (
        "models[0] (org/a): `calibration` takes a text per model or a list of texts, "
        "no filter or gradient"
    )


def test_an_empty_list_of_calibrations_is_refused() -> None:
    problem = only_problem(configuration(models=model("{calibration: []}")))
    assert problem.endswith("`calibration` is an empty list; give a value, or remove it")


def test_a_model_without_calibration_is_named_with_the_remedy() -> None:
    problem = only_problem(configuration(models=model("{weight: 2}")))
    assert problem.startswith("org/a: required `calibration`, text of the kind that this model is")
    assert "add `parameters: {calibration: PATH}` to it" in problem


def test_every_model_without_calibration_is_named() -> None:
    found = problems(configuration(models="[{model: org/a}, {model: org/b}]"))
    assert [problem.split(":")[0] for problem in found] == ["org/a", "org/b"]


def test_two_calibrations_of_one_model_are_refused() -> None:
    text = sliced(
        """
        - sources: [{model: org/a, layer_range: [0, 1], parameters: {calibration: x}}]
        - sources: [{model: org/a, layer_range: [1, 2], parameters: {calibration: y}}]
        """
    )
    assert only_problem(text) == "org/a: several calibrations (x, y); give one (or a list)"


@pytest.mark.parametrize("weight", ["0", "0.0", "'0'", "[0, 0]"])
@pytest.mark.parametrize("calibration", ["", "calibration: a, "])
def test_a_merge_in_which_no_data_counts_is_refused(weight: str, calibration: str) -> None:
    text = configuration(
        models="[{model: org/a}, {model: org/b}]",
        parameters=f"{{{calibration}loss_weight: {weight}}}",
    )
    assert only_problem(text) == (
        "every model has `loss_weight: 0`; at least one must count in the fit"
    )


def test_a_loss_weight_of_zero_behind_a_filter_does_not_spare_the_calibration() -> None:
    for setting in ("{filter: mlp, value: 0}", "[{filter: mlp, value: 0}]", "[0, 1]"):
        problem = only_problem(configuration(models=model(f"{{loss_weight: {setting}}}")))
        assert problem.startswith("org/a: required `calibration`")


def test_a_loss_weight_of_zero_in_one_slice_does_not_spare_the_calibration() -> None:
    text = sliced(
        """
        - sources:
          - {model: org/a, layer_range: [0, 1], parameters: {loss_weight: 0}}
          - {model: org/b, layer_range: [0, 1], parameters: {calibration: b}}
        - sources: [{model: org/a, layer_range: [1, 2]}]
        """
    )
    assert only_problem(text).startswith("org/a: required `calibration`")


@pytest.mark.parametrize("parameter", ["calibration: a", "weight: 2", "loss_weight: 1"])
def test_a_base_that_is_not_included_takes_no_parameters(parameter: str) -> None:
    models = MODELS + f"- model: org/base\n  parameters: {{{parameter}}}\n"
    name = parameter.split(":")[0]
    assert only_problem(configuration(models=models, base="org/base")) == (
        f"models[2] (org/base): the base takes no `{name}`; set `include_base: true` at top level "
        f"to merge it like the other models"
    )


def test_including_a_base_that_is_not_named_is_refused() -> None:
    assert only_problem(configuration(parameters="{include_base: true}")) == (
        "`include_base` is true, but the configuration names no `base_model`"
    )


def test_a_base_alone_is_no_merge() -> None:
    text = configuration(models="[{model: org/base}]", base="org/base")
    assert "models: required at least one model besides the base; got none" in problems(text)


def test_a_model_listed_twice_is_refused() -> None:
    text = configuration(models=MODELS + "- model: org/a\n")
    assert only_problem(text) == "models: org/a is listed 2 times; list it once"


def test_a_model_listed_twice_in_a_module_or_a_slice_is_refused() -> None:
    text = configuration(models="", more=module(models=MODELS + "- model: org/a"))
    assert only_problem(text) == ("modules.default.models: org/a is listed 2 times; list it once")
    text = sliced(
        """
        - sources:
          - {model: org/a, layer_range: [0, 1], parameters: {calibration: x}}
          - {model: org/a, layer_range: [1, 2]}
        """
    )
    assert only_problem(text) == "slices[0].sources: org/a is listed 2 times; list it once"


SLICE_OF_BOTH = """
- sources:
  - {model: org/a, layer_range: [0, 1], parameters: {calibration: a}}
  - {model: org/b, layer_range: [0, 1], parameters: {calibration: b}}
"""


def test_a_base_of_a_slice_is_refused() -> None:
    text = sliced(
        SLICE_OF_BOTH + "  - {model: org/c, layer_range: [0, 1]}\n  base_model: org/b\n",
        base="org/c",
    )
    assert only_problem(text).startswith(
        "slices[0]: `base_model` differs from that of the whole merge; dam takes one base"
    )


def test_a_slice_may_leave_out_models() -> None:
    text = sliced(SLICE_OF_BOTH + "- sources: [{model: org/a, layer_range: [1, 2]}]\n")
    assert check(text).learns
    assert check(text).models == refs("org/a", "org/b")


def test_a_slice_that_merges_models_without_the_base_is_refused() -> None:
    text = sliced(SLICE_OF_BOTH, base="org/base")
    assert only_problem(text).startswith(
        "slices[0]: org/a and org/b are merged without the base org/base; add it to the `sources`"
    )


def test_a_slice_of_one_model_needs_no_base() -> None:
    both = SLICE_OF_BOTH + "  - {model: org/base, layer_range: [0, 1]}\n"
    one = "- sources: [{model: org/a, layer_range: [1, 2]}]\n"
    assert check(sliced(both + one, base="org/base")).learns


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        (
            "[0, 2]|[0, 1]",
            "required equally many layers of every model, got 2 of org/a, 1 of org/b",
        ),
        ("[1, 1]|[1, 1]", "with 0 <= first < end, got [1, 1] of org/a"),
        ("[-1, 1]|[0, 2]", "with 0 <= first < end, got [-1, 1] of org/a"),
    ],
)
def test_layer_ranges_that_mean_nothing_are_refused(ranges: str, reason: str) -> None:
    a, b = ranges.split("|")
    text = sliced(
        f"""
        - sources:
          - {{model: org/a, layer_range: {a}, parameters: {{calibration: a}}}}
          - {{model: org/b, layer_range: {b}, parameters: {{calibration: b}}}}
        """
    )
    found = problems(text)[0]
    assert found.startswith("slices[0]: ")
    assert reason in found


def test_a_slice_of_nothing_and_a_residual_weight_are_refused() -> None:
    assert (
        problems(sliced("- sources: []"))[-1] == "slices[0]: required at least one source; got none"
    )
    text = sliced(SLICE_OF_BOTH + "  residual_weight: 0.5\n")
    assert only_problem(text) == "slices[0]: mergekit ignores `residual_weight`; remove it"


def test_one_model_needs_no_calibration() -> None:
    checked = check(configuration(models="[{model: org/a}]"))
    assert not checked.learns
    assert not checked.calibrations


def test_slices_of_one_model_each_need_no_calibration() -> None:
    text = sliced(
        """
        - sources: [{model: org/a, layer_range: [0, 24]}]
        - sources: [{model: org/b, layer_range: [20, 40]}]
        """
    )
    assert not check(text).learns


@pytest.mark.parametrize("listed", ["", ", {model: org/base}"])
def test_one_model_beside_a_base_is_refused(listed: str) -> None:
    models = f"[{{model: org/a, parameters: {{calibration: a}}}}{listed}]"
    assert only_problem(configuration(models=models, base="org/base")).startswith(
        "models: org/a alone would be merged, because the base is not merged by default; "
        "set `include_base: true`"
    )
    both = configuration(
        models=models, base="org/base", parameters="{include_base: true, calibration: b}"
    )
    assert check(both).learns


def test_a_base_that_is_included_and_not_listed_is_merged_with_one_model() -> None:
    text = configuration(
        models="[{model: org/a}]",
        base="org/base",
        parameters="{include_base: true, calibration: b}",
    )
    assert check(text).learns
    assert len(check(text).calibrations) == 2


def test_all_problems_of_settings_are_reported_together() -> None:
    text = configuration(
        models=model("{calibration: [1, 2], ridge: 1}"),
        parameters="{sampels: 3, density: 0.5, holdout: 2}",
        more="dam: {}",
    )
    found = problems(text)
    assert len(found) == 6
    with pytest.raises(DamError, match="6 problems in the dam configuration:\n  - the config"):
        check(text)


def test_all_problems_of_models_are_reported_together() -> None:
    text = configuration(
        models="[{model: org/a}, {model: org/b}, {model: org/b}]",
        parameters="{include_base: true}",
    )
    found = problems(text)
    assert len(found) == 4
    assert sum("required `calibration`" in problem for problem in found) == 2
