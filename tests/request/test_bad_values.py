"""Values that pydantic or mergekit would take, or find too late, and settings of other methods."""

import logging

import pytest

from tests.kit.configurations import check, configuration, problems

BAD = [
    ("samples: true", "`samples` is True: required a number, not true or false"),
    ("ridge: true", "`ridge` is True: required a number, not true or false"),
    ("temperature: false", "`temperature` is False: required a number"),
    ("gpu_memory: true", "`gpu_memory` is True: required a number"),
    ("ridge: [0.1, true]", "`ridge` is True: required a number"),
    ("ridge: .inf", "`ridge` is inf: input should be"),
    ("ridge: .nan", "`ridge` is nan: input should be"),
    ("ridge: 1.0e+308", "`ridge` is 1e+308: input should be less than or equal to"),
    ("weight: .inf", "`weight` is inf: input should be"),
    ("weight: .nan", "`weight` is nan: input should be"),
    ("loss_weight: -.inf", "`loss_weight` is -inf: input should be"),
    ("temperature: .inf", "`temperature` is inf: input should be"),
    ("temperature: 1.0e-300", "`temperature` is 1e-300: input should be greater than or equal to"),
    (f"samples: {10**40}", "input should be less than or equal to"),
    (f"sequence_length: {10**40}", "input should be less than or equal to"),
    (f"seed: {10**40}", "input should be less than or equal to"),
    (f"gpu_memory: {10**40}", "input should be less than or equal to"),
    (f"ridge: {10**400}", "`ridge` is 1000"),
    ("ridge: []", "`ridge` is an empty list; give a value, or remove it"),
    ("ridge: [{filter: mlp, value: []}]", "`ridge` is an empty list"),
    ("weight: -0.5", "`weight` is only the start of the fit: remove it"),
    ("dtype: bfloat16", "`dtype` stands inside of `parameters:`"),
    ("base_model: a", "move `base_model` out, to the top level"),
    ("tokenizer_source: base", "move `tokenizer_source` out, to the top level"),
    ("out_dtype: float32", "move `out_dtype` out, to the top level"),
    ("merge_method: ties", "move `merge_method` out, to the top level"),
    ("normalize: true", "`normalize` is a parameter of"),
    ("int8_mask: true", "`int8_mask` is a parameter of"),
    ("density: 0.5", "`density` is a parameter of"),
    ("lambda: 1", "`lambda` is a parameter of"),
    ("t: 0.5", "`t` is a parameter of"),
    ("gamma: 0.01", "`gamma` is a parameter of"),
    ("epsilon: 0.01", "`epsilon` is a parameter of"),
]


@pytest.mark.parametrize(("parameters", "message"), BAD, ids=[b[0][:40] for b in BAD])
def test_a_bad_value_is_refused_with_the_remedy(parameters: str, message: str) -> None:
    found = problems(configuration(parameters=f"{{{parameters}}}"))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("bfloat", "bfloat16"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("float", "float32"),
        ("BFLOAT16", "bfloat16"),
        ("torch.half", "float16"),
        ("flaot32", "float32"),
    ],
)
def test_a_dtype_by_another_name_is_told(key: str, name: str, meant: str) -> None:
    (problem,) = problems(configuration(more=f"{key}: {name}"))
    assert problem.startswith(f"`{key}` is {name!r}: required one of float32, bfloat16")
    assert problem.endswith(f"did you mean `{meant}`?")


@pytest.mark.parametrize("name", ["int64", "int8", "auto", "nf4"])
def test_a_dtype_that_no_merge_has_is_refused(name: str) -> None:
    (problem,) = problems(configuration(more=f"dtype: {name}"))
    assert problem.startswith(f"`dtype` is {name!r}: required one of float32")


def test_a_converted_configuration_is_told_everything_at_once() -> None:
    models = """
    - {model: org/a, parameters: {weight: 0.5, density: 0.5}}
    - {model: org/b, parameters: {weight: 0.5, density: 0.5}}
    """
    told = problems(
        configuration(
            models=models, parameters="{normalize: true, int8_mask: true}", more="dtype: bfloat"
        )
    )
    for part in ("`dtype`", "`density`", "`normalize`", "`int8_mask`"):
        assert len([p for p in told if part in p]) == 1
    assert len([p for p in told if "required `calibration`" in p]) == 2


def test_a_weight_kept_from_another_method_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    models = """
    - {model: org/a, parameters: {weight: 0.5, calibration: a}}
    - {model: org/b, parameters: {calibration: b%s}}
    """
    with caplog.at_level(logging.WARNING):
        check(configuration(models=models % ""))
    assert "`weight` of org/a is not the model's share in the result" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check(configuration(models=models % ", loss_weight: 2"))
    assert caplog.text == ""
