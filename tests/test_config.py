"""Every way a configuration can be wrong, with what is said about it; and what is accepted."""

from textwrap import dedent, indent
from typing import Any

import pytest
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_dam.errors import ConfigError, DamError
from mergekit_dam.parameters import LogitsParameters
from mergekit_dam.request.check import Checked, check_configuration

MODELS = """
- model: org/a
  parameters: {calibration: a.jsonl}
- model: org/b
  parameters: {calibration: b.jsonl}
"""


def configuration(
    *, models: str = MODELS, parameters: str = "", base: str | None = None, more: str = ""
) -> str:
    """The YAML of a dam merge."""
    parts = ["merge_method: dam", more.strip()]
    if models:
        parts.append(f"models:\n{indent(dedent(models).strip(), '  ')}")
    if parameters:
        parts.append(f"parameters: {parameters}")
    if base:
        parts.append(f"base_model: {base}")
    return "\n".join(part for part in parts if part)


def sliced(slices: str, *, parameters: str = "", base: str | None = None) -> str:
    more = f"slices:\n{indent(dedent(slices).strip(), '  ')}"
    return configuration(models="", parameters=parameters, base=base, more=more)


def module(more: str = "", models: str = MODELS) -> str:
    """The models as those of a module, which takes `more` keys."""
    lines = f"{more}\nmodels:\n{indent(models.strip(), '  ')}".strip()
    return f"modules:\n  default:\n{indent(lines, '    ')}"


def check(text: str) -> Checked:
    source = yaml.safe_load(text)
    return check_configuration(MergeConfiguration.model_validate(source), source)


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check(text)
    return caught.value.problems


def only_problem(text: str) -> str:
    (problem,) = problems(text)
    return problem


def model(parameters: str) -> str:
    """Two models, the first with these parameters."""
    return f"""
    - model: org/a
      parameters: {parameters}
    - model: org/b
      parameters: {{calibration: b.jsonl}}
    """


def refs(*names: str) -> tuple[ModelReference, ...]:
    return tuple(ModelReference.model_validate(name) for name in names)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (configuration(parameters="{sampels: 8}"), "parameters (top level)"),
        (configuration(models=model("{calibration: a, sampels: 8}")), "models[0] (org/a)"),
        (
            configuration(
                models="",
                more=module("parameters: {sampels: 8}"),
            ),
            "modules.default",
        ),
        (
            sliced(
                """
                - parameters: {sampels: 8}
                  sources:
                  - {model: org/a, layer_range: [0, 2], parameters: {calibration: a}}
                """
            ),
            "slices[0]",
        ),
        (
            sliced(
                """
                - sources:
                  - {model: org/a, layer_range: [0, 2], parameters: {calibration: a, sampels: 1}}
                """
            ),
            "slices[0].sources[0] (org/a)",
        ),
    ],
)
def test_an_unknown_parameter_is_found_at_every_scope(text: str, where: str) -> None:
    assert only_problem(text) == f"{where}: unknown parameter `sampels`; did you mean `samples`?"


def test_a_parameter_like_no_other_gets_the_list_of_those_there_are() -> None:
    problem = only_problem(configuration(parameters="{xyzzy: 8}"))
    assert "unknown parameter `xyzzy`; dam knows batch_size, calibration, coefficients" in problem


@pytest.mark.parametrize(
    ("name", "owners"),
    [
        ("density", ("ties", "dare_ties")),
        ("normalize", ("linear", "ties")),
        ("lambda", ("ties",)),
        ("t", ("slerp",)),
    ],
)
def test_a_parameter_of_another_method_is_named_as_such(name: str, owners: tuple[str, ...]) -> None:
    problem = only_problem(configuration(models=model(f"{{calibration: a, {name}: 0.5}}")))
    assert problem.startswith(f"models[0] (org/a): `{name}` is a parameter of ")
    assert problem.endswith(", not of dam; remove it")
    assert all(owner in problem for owner in owners)


def test_a_parameter_of_another_method_is_one_problem_wherever_it_stands() -> None:
    models = """
    - {model: org/a, parameters: {calibration: a, density: 0.5}}
    - {model: org/b, parameters: {calibration: b, density: 0.3}}
    """
    found = problems(configuration(models=models, parameters="{normalize: true, t: 0.5}"))
    assert len(found) == 3
    assert any(p.startswith("models[0] (org/a), models[1] (org/b): `density` is") for p in found)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("dam: {samples: 8}", "the configuration: unknown key `dam`; mergekit would ignore it"),
        (
            "calibration: a.jsonl",
            "the configuration: `calibration` stands outside of `parameters:`; move it inside",
        ),
        (
            "ridge: 0.1",
            "the configuration: `ridge` stands outside of `parameters:`; move it inside",
        ),
        (
            "base_modle: org/base",
            "the configuration: unknown key `base_modle`; did you mean `base_model`?",
        ),
    ],
)
def test_keys_that_mergekit_drops_at_top_level_are_refused(more: str, expected: str) -> None:
    assert only_problem(configuration(more=more)) == expected


def test_keys_that_mergekit_drops_in_models_slices_and_modules_are_refused() -> None:
    models = """
    - model: org/a
      calibration: a.jsonl
      parameters: {calibration: a.jsonl}
    - model: org/b
      weights: 1
      parameters: {calibration: b.jsonl}
    """
    assert problems(configuration(models=models)) == (
        "models[0]: `calibration` stands outside of `parameters:`; move it inside",
        "models[1]: unknown key `weights`; mergekit would ignore it",
    )
    in_slice = sliced(
        """
        - paramters: {ridge: 1}
          sources:
          - {model: org/a, layer_range: [0, 2], layer_rnge: 3, parameters: {calibration: a}}
        """
    )
    assert problems(in_slice) == (
        "slices[0]: unknown key `paramters`; did you mean `parameters`?",
        "slices[0].sources[0]: unknown key `layer_rnge`; did you mean `layer_range`?",
    )
    in_module = configuration(models="", more=module("dtype: float32"))
    assert only_problem(in_module).startswith("modules.default: unknown key `dtype`")


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ("{ridge: 0}", "`ridge` is 0: input should be greater than 0"),
        ("{ridge: -1e-3}", "`ridge` is '-1e-3': input should be greater than 0"),
        ("{ridge: much}", "`ridge` is 'much': input should be a valid number"),
        ("{samples: 0}", "`samples` is 0: input should be greater than 0"),
        ("{samples: 1.5}", "`samples` is 1.5: input should be a valid integer"),
        ("{samples: many}", "`samples` is 'many': input should be a valid integer"),
        ("{sequence_length: 1}", "`sequence_length` is 1: input should be greater than 1"),
        ("{holdout: 1}", "`holdout` is 1: input should be less than 1"),
        ("{holdout: -0.1}", "`holdout` is -0.1: input should be greater than or equal to 0"),
        ("{temperature: 0}", "`temperature` is 0: input should be greater than 0"),
        (
            "{objective: logit}",
            "`objective` is 'logit': input should be 'layer', 'logits' or 'layer+logits'",
        ),
        ("{metric: full}", "`metric` is 'full': input should be 'identity' or 'sensitivity'"),
        ("{resident: yes}", "`resident` is True: input should be 'auto', 'always' or 'never'"),
        ("{steps: 0}", "`steps` is 0: input should be greater than 0"),
        ("{batch_size: 0}", "`batch_size` is 0: input should be greater than 0"),
        ("{warmup: 1}", "`warmup` is 1: input should be less than 1"),
        ("{mofo_fraction: 2}", "`mofo_fraction` is 2: input should be less than or equal to 1"),
        ("{l1: -1}", "`l1` is -1: input should be greater than or equal to 0"),
        ("{optimizer: sgd}", "`optimizer` is 'sgd': input should be 'adamw' or 'mofo'"),
        ("{nonlinearity: gelu}", "`nonlinearity` is 'gelu': input should be 'none', 'tanh', 's"),
        ("{seed: -1}", "`seed` is -1: input should be greater than or equal to 0"),
        ("{granularity: row}", "`granularity` is 'row': input should be 'column' or 'tensor'"),
        ("{sum_to_one: maybe}", "`sum_to_one` is 'maybe': input should be a valid boolean"),
        ("{norms: 2}", "`norms` is 2: input should be a valid boolean"),
        ("{include_base: 3}", "`include_base` is 3: input should be a valid boolean"),
        ("{coefficients: 3}", "`coefficients` is 3: input should be a valid string"),
        ("{weight: -1}", "`weight` is -1: input should be greater than or equal to 0"),
        ("{loss_weight: -1}", "`loss_weight` is -1: input should be greater than or equal to 0"),
        ("{calibration: 5}", "`calibration` is 5: input should be a valid string"),
    ],
)
def test_wrong_types_and_ranges_are_refused(parameters: str, reason: str) -> None:
    if "objective" not in parameters:
        parameters = parameters.replace("{", "{objective: layer+logits, ")
    problem = only_problem(configuration(parameters=parameters))
    assert problem.startswith(f"parameters (top level): {reason}")


@pytest.mark.parametrize(
    "setting",
    ["[{filter: mlp, value: 0}, {value: 0.1}]", "{filter: mlp, value: -1}", "[0.1, 0]"],
)
def test_values_inside_filters_and_gradients_are_checked(setting: str) -> None:
    problem = only_problem(configuration(parameters=f"{{ridge: {setting}}}"))
    assert "`ridge` is" in problem
    assert "greater than 0" in problem


VALUES = {
    "optimizer": "mofo",
    "lr_schedule": "linear",
    "nonlinearity": "tanh",
    "start": "random",
    "warmup": "0.1",
    "mofo_fraction": "0.1",
}


@pytest.mark.parametrize("name", LogitsParameters.model_fields)
def test_what_only_the_end_to_end_fit_reads_is_refused_without_it(name: str) -> None:
    given = f"{name}: {VALUES.get(name, '1')}"
    assert only_problem(configuration(parameters=f"{{objective: layer, {given}}}")) == (
        f"parameters (top level): `objective: layer` takes no `{name}`; set `objective: logits` or "
        f"`objective: layer+logits`, or remove it"
    )
    more = ", optimizer: mofo" if name == "mofo_fraction" else ""
    check(configuration(base="org/c", parameters=f"{{objective: logits, {given}{more}}}"))


def test_all_that_an_objective_does_not_read_is_one_problem() -> None:
    problem = only_problem(configuration(parameters="{objective: layer, steps: 8, l1: 0}"))
    assert "takes no `steps`, `l1`; set" in problem
    assert problem.endswith("or remove them")


def test_a_default_that_is_given_counts_as_given() -> None:
    steps = LogitsParameters().steps
    only_problem(configuration(parameters=f"{{objective: layer, steps: {steps}}}"))


def test_a_metric_without_layer_fits_is_refused() -> None:
    problem = only_problem(configuration(parameters="{objective: logits, metric: identity}"))
    assert problem == (
        "parameters (top level): `objective: logits` takes no `metric`, as it fits no layers; set "
        "`objective: layer+logits`, or remove it"
    )


@pytest.mark.parametrize("optimizer", ["", "optimizer: adamw, "])
def test_a_fraction_of_mofo_without_mofo_is_refused(optimizer: str) -> None:
    parameters = f"{{objective: logits, {optimizer}mofo_fraction: 0.5}}"
    assert only_problem(configuration(parameters=parameters)) == (
        "parameters (top level): `optimizer: adamw` takes no `mofo_fraction`; set `optimizer: "
        "mofo`, or remove it"
    )


def test_a_weighted_overlap_without_a_base_is_refused() -> None:
    parameters = "{objective: logits, weighted_overlap: '1e-2'}"
    assert only_problem(configuration(parameters=parameters)) == (
        "parameters (top level): `weighted_overlap` is 0.01, but the configuration names no "
        "`base_model` to take task vectors from; name one, or set `overlap`"
    )
    check(configuration(parameters="{objective: logits, weighted_overlap: 0}"))


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu"])
def test_a_nonlinearity_after_layer_fits_is_refused(name: str) -> None:
    parameters = f"{{objective: layer+logits, nonlinearity: {name}}}"
    problem = only_problem(configuration(parameters=parameters, base="org/base"))
    assert problem.startswith(
        f"parameters (top level): `nonlinearity: {name}` cannot give every coefficient that layers "
        f"may be fitted to"
    )
    assert problem.endswith("set `objective: logits`, or `nonlinearity: none`")


@pytest.mark.parametrize("name", ["sigmoid", "relu"])
@pytest.mark.parametrize("more", ["", ", sum_to_one: true", ", sum_to_one: [true, true]"])
def test_a_nonlinearity_that_cannot_give_deviations_from_the_average_is_refused(
    name: str, more: str
) -> None:
    parameters = f"{{objective: logits, nonlinearity: {name}{more}}}"
    problem = only_problem(configuration(parameters=parameters))
    assert problem.startswith(f"parameters (top level): `nonlinearity: {name}` has no start")
    assert "set `sum_to_one: false`, name a `base_model`, or take `tanh` or `none`" in problem


@pytest.mark.parametrize(
    ("more", "base"),
    [
        (", nonlinearity: sigmoid", "org/base"),
        (", nonlinearity: relu", "org/base"),
        (", nonlinearity: sigmoid, sum_to_one: false", None),
        (", nonlinearity: sigmoid, sum_to_one: [{filter: mlp, value: false}]", None),
        (", nonlinearity: tanh", None),
        (", nonlinearity: none", None),
    ],
)
def test_a_nonlinearity_that_may_have_a_start_is_accepted(more: str, base: str | None) -> None:
    check(configuration(parameters=f"{{objective: logits{more}}}", base=base))


def test_all_problems_of_an_objective_are_reported_together() -> None:
    parameters = (
        "{objective: logits, metric: identity, mofo_fraction: 1, weighted_overlap: 1, "
        "nonlinearity: relu, include_base: true, ridge: 0}"
    )
    found = problems(configuration(parameters=parameters))
    assert len(found) == 6


@pytest.mark.parametrize(
    "parameters",
    [
        "{objective: layers, steps: 3}",
        "{objective: logits, optimizer: mofu, mofo_fraction: 0.2}",
        "{objective: logits, weighted_overlap: -1}",
        "{objective: logits, nonlinearity: sigma}",
    ],
)
def test_of_a_parameter_with_a_wrong_value_nothing_follows_for_others(parameters: str) -> None:
    only_problem(configuration(parameters=parameters))


def test_a_replay_may_keep_the_parameters_of_its_merge() -> None:
    parameters = "{objective: logits, steps: 3, start: gone, coefficients: out}"
    assert check(configuration(parameters=parameters)).run.steps == 3


def test_a_parameter_of_the_whole_merge_is_refused_for_one_model() -> None:
    problem = only_problem(configuration(models=model("{calibration: a, seed: 3}")))
    assert problem == (
        "models[0] (org/a): `seed` holds for the whole merge; set it under `parameters` at top "
        "level"
    )


def test_samples_of_one_model_are_told_where_to_go() -> None:
    problem = only_problem(configuration(models=model("{calibration: a, samples: 3}")))
    assert "holds for the whole merge" in problem
    assert problem.endswith("for one model's sequences write `calibration: SOURCE:samples=N`")


@pytest.mark.parametrize("setting", ["[8, 16]", "{filter: mlp, value: 8}", "[{value: 8}]"])
def test_a_parameter_of_the_whole_merge_takes_no_filter_or_gradient(setting: str) -> None:
    problem = only_problem(configuration(parameters=f"{{samples: {setting}}}"))
    assert problem.endswith("`samples` takes one value for the whole merge, no filter or gradient")


def test_a_parameter_of_a_tensor_is_refused_for_one_model() -> None:
    problem = only_problem(configuration(models=model("{calibration: a, ridge: 0.1}")))
    assert problem == (
        "models[0] (org/a): `ridge` belongs to the merged tensor, not to one model; set it at top "
        "level or for a slice"
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


@pytest.mark.parametrize("setting", ["[a.jsonl, b.jsonl]", "{filter: mlp, value: a.jsonl}"])
def test_a_list_or_filter_for_calibration_is_refused(setting: str) -> None:
    problem = only_problem(configuration(models=model(f"{{calibration: {setting}}}")))
    assert problem == (
        "models[0] (org/a): `calibration` takes one text per model, no filter or gradient"
    )


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
    assert only_problem(text) == "org/a: several calibrations (x, y); give one"


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
        ("[0, 2]|[0, 1]", "required as many layers of every model, got 2 of org/a, 1 of org/b"),
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
        "models: org/a alone would be merged, as the base is no model to merge unless asked for; "
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
        models=model("{calibration: [a, b], ridge: 1}"),
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


def test_problems_of_settings_and_of_models_are_told_together() -> None:
    source = {
        "merge_method": "dam",
        "parameters": {"smaples": 4, "include_base": True},
        "models": [{"model": "a", "parameters": {"weight": -1, "calibration": "a.txt"}}],
    }
    with pytest.raises(ConfigError) as caught:
        check_configuration(MergeConfiguration.model_validate(source), source)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for part in ("did you mean `samples`", "`weight` is -1", "names no `base_model`"):
        assert part in told
