"""Unknown, misplaced and malformed parameters of a configuration."""

import pytest

from tests.kit.configurations import configuration, model, module, only_problem, problems, sliced


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
    assert "unknown parameter `xyzzy`; dam knows batch_size, calibration, changed_models" in problem


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
        (
            "dam: {samples: 8}",
            "the configuration: unknown key `dam`; mergekit would ignore it; remove it",
        ),
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
        "models[1]: unknown key `weights`; mergekit would ignore it; remove it",
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
        ("{temperature: 0}", "`temperature` is 0: input should be greater than or equal to 0.001"),
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


def test_a_parameter_of_the_whole_merge_is_refused_for_one_model() -> None:
    problem = only_problem(configuration(models=model("{calibration: a, seed: 3}")))
    assert problem == (
        "models[0] (org/a): `seed` holds for the whole merge; set it under `parameters` at top "
        "level"
    )


def test_samples_of_one_model_are_refused_with_the_right_place() -> None:
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
