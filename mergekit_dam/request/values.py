"""Checks of the values of a configuration, one by one: parameters and dtypes."""

import difflib

from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting
from pydantic import ValidationError

from mergekit_dam.errors import listed
from mergekit_dam.parameters import RunParameters, TensorParameters
from mergekit_dam.request.help import OWNERS, is_number
from mergekit_dam.request.scopes import SPECS, Scope, scalars

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes that a merge can be computed and written in."""

_OTHER_NAMES = {
    "bf16": "bfloat16",
    "bfloat": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "full": "float32",
    "fp64": "float64",
    "double": "float64",
}
"""What other tools call them."""


def check_dtypes(config: MergeConfiguration) -> list[str]:
    """Problems with `dtype` and `out_dtype`, which mergekit would find after the fit began."""
    problems = []
    for key, value in (("dtype", config.dtype), ("out_dtype", config.out_dtype)):
        name = (value or "").removeprefix("torch.")
        if value is None or name in DTYPES:
            continue
        lower = name.lower()
        close = difflib.get_close_matches(lower, DTYPES, n=1)
        meant = _OTHER_NAMES.get(lower) or next(iter(close), None)
        hint = f"; did you mean `{meant}`?" if meant else ""
        problems.append(f"`{key}` is {value!r}: required one of {', '.join(DTYPES)}{hint}")
    return problems


def check_setting(scope: Scope, name: str, setting: ParameterSetting) -> list[str]:
    """Problems with one parameter of dam in one scope."""
    where = f"{scope.label}: `{name}`"
    misplaced = _misplaced(scope, name, setting)
    if misplaced is not None:
        return [f"{where} {misplaced}"]
    if _has_empty_list(setting):
        return [f"{where} is an empty list; give a value, or remove it"]
    found = [(value, _problem(name, value)) for value in scalars(setting)]
    return [f"{where} is {_short(value)}: {problem}" for value, problem in found if problem]


def _misplaced(scope: Scope, name: str, setting: ParameterSetting) -> str | None:
    """Why a parameter cannot stand in a scope, or not in this form."""
    owner = OWNERS[name]
    plain = isinstance(setting, (bool, int, float, str))
    if owner is RunParameters:
        if scope.level != "top":
            hint = (
                "; for one model's sequences write `calibration: SOURCE:samples=N`"
                if name == "samples"
                else ""
            )
            return f"holds for the whole merge; set it under `parameters` at top level{hint}"
        if not plain:
            return "takes one value for the whole merge, no filter or gradient"
    if owner is TensorParameters and scope.level == "model":
        return "belongs to the merged tensor, not to one model; set it at top level or for a slice"
    if name == "calibration":
        if scope.level == "group":
            return "belongs to a model (or to all, at top level), not to a slice"
        is_list = isinstance(setting, list) and all(isinstance(text, str) for text in setting)
        if not plain and not is_list:
            return "takes a text per model or a list of texts, no filter or gradient"
    return None


def _has_empty_list(setting: ParameterSetting) -> bool:
    """Whether a gradient or a list of filters has no entry: mergekit makes no value of it."""
    if isinstance(setting, ConditionalParameter):
        return _has_empty_list(setting.value)
    if isinstance(setting, list):
        return not setting or any(map(_has_empty_list, setting))
    return False


def _problem(name: str, value: object) -> str | None:
    """What is wrong with one value of a parameter, if anything is."""
    if isinstance(value, bool) and is_number(OWNERS[name].model_fields[name]):
        return "required a number, not true or false"  # pydantic would take true for 1
    try:
        SPECS[name].validate(value)
    except (ValidationError, OverflowError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        return f"{said[0].lower()}{said[1:]}{_hint(name, value)}"
    return None


def _hint(name: str, value: object) -> str:
    if name == "weight" and isinstance(value, (int, float)) and value < 0:
        return (
            "; dam learns the coefficients, negative ones too, and `weight` is only the start of "
            "the fit: remove it"
        )
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def meaning_of_weight(scopes: list[Scope]) -> str | None:
    """What `weight` means here, where it seems to be kept from another merge method.

    Who sets `loss_weight` as well knows the difference.
    """
    models = [scope for scope in scopes if scope.level == "model" and "weight" in scope.settings]
    if not models or any("loss_weight" in scope.settings for scope in scopes):
        return None
    return (
        f"`weight` of {listed([scope.model for scope in models])} is not the model's share in the "
        f"result, as in other merge methods: it is the share in the average that the fit starts "
        f"from and is pulled to. To make a model's skill count more, set `loss_weight`"
    )
