"""Checks of a dam configuration, before any work; one error reports all problems."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting

from mergekit_dam.calibration.mixture import Calibration, problems_of
from mergekit_dam.errors import ConfigError
from mergekit_dam.parameters import ModelParameters, RunParameters
from mergekit_dam.request.document import Document
from mergekit_dam.request.help import OWNERS
from mergekit_dam.request.keys import unknown_keys, unknown_parameter
from mergekit_dam.request.objective import check_objective, quoted, unread_by_replay
from mergekit_dam.request.scopes import (
    SPECS,
    Scope,
    input_lists,
    listed_models,
    scalars,
    scopes_of,
)
from mergekit_dam.request.slices import check_slices
from mergekit_dam.request.values import check_dtypes, check_setting, meaning_of_weight

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A valid configuration, resolved for the whole merge.

    Attributes:
        run: Parameters of the whole merge.
        models: Models to merge, in the order of the YAML; the base comes last, if included.
        base: The base model, if there is one.
        calibrations: Calibration source of each model whose data takes part in the fit.
        learns: Whether there is something to learn: two models are merged somewhere.
    """

    run: RunParameters
    models: tuple[ModelReference, ...]
    base: ModelReference | None
    calibrations: Mapping[ModelReference, Calibration]
    learns: bool = True


def check_configuration(
    config: MergeConfiguration, document: Document | None = None, *, texts: bool = False
) -> Checked:
    """Check everything that can be checked before a model or a text is read.

    Args:
        config: The configuration, as read by mergekit.
        document: The parsed YAML, to find keys that mergekit drops silently.
        texts: Whether the sources of calibration text are checked, too; they have to be there.

    Raises:
        ConfigError: With every problem found.
    """
    problems: list[str] = []
    if document is not None:
        problems += unknown_keys(document)
    problems += check_dtypes(config)
    scopes, wrong, found = _sound_scopes(config)
    problems += found
    # A model with an invalid `calibration` must not also be reported as having none.
    reported = any("`calibration`" in problem for problem in problems)
    top = {k: v for scope in scopes if scope.level == "top" for k, v in scope.settings.items()}
    run = RunParameters.model_validate({k: top[k] for k in top if OWNERS[k] is RunParameters})
    listed = listed_models(config)
    problems += _check_models(config, run, listed, scopes)
    problems += check_slices(config)
    problems += check_objective(config, run, scopes, wrong)
    models = tuple(m for m in listed if m != config.base_model)
    if run.include_base and config.base_model is not None:
        models = (*models, config.base_model)
    learns = len(models) > 1 and _merges_somewhere(config, run)
    calibrations, missing = _calibrations(models, scopes, top, needed=learns)
    if run.coefficients is None:
        problems += [] if reported else missing
        problems += _check_texts(calibrations, run) if texts else []
    if problems:
        raise ConfigError(*problems)
    if run.coefficients is not None:
        remark = unread_by_replay(scopes)
    else:
        remark = meaning_of_weight(scopes) if learns else None
    if remark is not None:
        LOG.warning("%s", remark)
    return Checked(run, models, config.base_model, calibrations, learns)


def _sound_scopes(config: MergeConfiguration) -> tuple[list[Scope], set[str], list[str]]:
    """Every scope with the parameters that are valid by themselves.

    Returns:
        The scopes; the names of parameters with an invalid value; the problems. Invalid
        parameters are reported here, and later checks run as if they were not there.
    """
    scopes, wrong, problems = [], set(), []
    unknown: dict[str, list[str]] = {}
    for scope in scopes_of(config):
        sound = {}
        for name, setting in scope.settings.items():
            if name not in OWNERS:
                unknown.setdefault(name, []).append(scope.label)
                continue
            found = check_setting(scope, name, setting)
            problems += found
            if found:
                wrong.add(name)
            else:
                sound[name] = setting
        scopes.append(dataclasses.replace(scope, settings=sound))
    problems += [f"{', '.join(at)}: {unknown_parameter(name)}" for name, at in unknown.items()]
    return scopes, wrong, problems


def _merges_somewhere(config: MergeConfiguration, run: RunParameters) -> bool:
    """Whether some list of inputs has two models.

    With `include_base`, the base is added to lists of models, as in mergekit, but not to slices.
    """
    return any(
        len(inputs) > 1 or (run.include_base and path.endswith("models") and bool(inputs))
        for path, inputs in input_lists(config)
    )


def _check_models(
    config: MergeConfiguration,
    run: RunParameters,
    listed: list[ModelReference],
    scopes: list[Scope],
) -> list[str]:
    """Problems with the choice of the models to merge, and with the base."""
    problems = []
    base = config.base_model
    others = [model for model in listed if model != base]
    if not others:
        problems.append("models: required at least one model besides the base; got none")
    elif len(others) == 1 and base is not None and not run.include_base and not run.coefficients:
        problems.append(
            f"models: {others[0]} alone would be merged, because the base is not merged by "
            f"default; set `include_base: true` at top level and give the base a `calibration` "
            f"too, or name no `base_model`"
        )
    if run.include_base and base is None:
        problems.append("`include_base` is true, but the configuration names no `base_model`")
    if not run.include_base:
        for scope in scopes:
            extra = [n for n in scope.settings if OWNERS[n] is ModelParameters]
            if scope.model is not None and scope.model == base and extra:
                problems.append(
                    f"{scope.label}: the base takes no {quoted(extra)}; set "
                    f"`include_base: true` at top level to merge it like the other models"
                )
    for path, inputs in input_lists(config):
        for model in dict.fromkeys(m for m in inputs if inputs.count(m) > 1):
            problems.append(f"{path}: {model} is listed {inputs.count(model)} times; list it once")
    return problems


def _check_texts(
    calibrations: Mapping[ModelReference, Calibration], run: RunParameters
) -> list[str]:
    """Problems with the sources of calibration text, without reading any."""
    return [
        f"calibration of {model}: {problem}"
        for model, value in calibrations.items()
        for problem in problems_of(value, run.samples)
    ]


def _calibrations(
    models: tuple[ModelReference, ...],
    scopes: list[Scope],
    top: Mapping[str, Any],
    *,
    needed: bool,
) -> tuple[dict[ModelReference, Calibration], list[str]]:
    """The calibration source of every model that needs one, and the problems found.

    Args:
        needed: Whether there is something to learn; if not, no calibration is read.
    """
    found: dict[ModelReference, Calibration] = {}
    problems = []
    for model in models:
        own = [scope.settings for scope in scopes if scope.model == model]
        texts = {_sources(s["calibration"]) for s in own if s.get("calibration") is not None}
        if len(texts) > 1:
            different = ", ".join(sorted(map(str, texts)))
            problems.append(f"{model}: several calibrations ({different}); give one (or a list)")
        if not texts and top.get("calibration") is not None:
            texts = {_sources(top["calibration"])}
        default = top.get("loss_weight", 1.0)
        weights = [settings.get("loss_weight", default) for settings in own] or [default]
        silent = not needed or all(_is_zero(weight) for weight in weights)
        if texts and not silent:
            found[model] = texts.pop()
        elif not silent:
            problems.append(
                f"{model}: required `calibration`, text of the kind that this model is good at; "
                f"add `parameters: {{calibration: PATH}}` to it (`mergekit-dam` reads files, "
                f"folders and datasets of the Hub), or `calibration: self`, and it writes the text"
            )
    if needed and models and not found and not problems:
        problems.append("every model has `loss_weight: 0`; at least one must count in the fit")
    return found, problems


def _sources(setting: ParameterSetting) -> Calibration:
    """A valid `calibration` as a value that can be compared."""
    return tuple(map(str, setting)) if isinstance(setting, list) else str(setting)


def _is_zero(weight: ParameterSetting) -> bool:
    """Whether a loss weight is 0 for every tensor; a filter leaves the default for others."""
    if isinstance(weight, ConditionalParameter):
        return False
    if isinstance(weight, list) and any(isinstance(w, ConditionalParameter) for w in weight):
        return False
    values = [SPECS["loss_weight"].validate(value) for value in scalars(weight)]
    return bool(values) and not any(values)
