"""Checks of combinations of the objective's parameters."""

from collections.abc import Collection, Iterable

from mergekit.config import MergeConfiguration

from mergekit_dam.parameters import (
    REPLAYED,
    LogitsParameters,
    ModelParameters,
    RunParameters,
    TensorParameters,
)
from mergekit_dam.request.help import OWNERS
from mergekit_dam.request.scopes import SPECS, Scope, scalars


def check_objective(
    config: MergeConfiguration, run: RunParameters, scopes: list[Scope], wrong: Collection[str]
) -> list[str]:
    """Problems with combinations of the objective's parameters.

    Args:
        config: The configuration, as read by mergekit.
        run: Parameters of the whole merge.
        scopes: Every scope with its valid parameters.
        wrong: Parameters with an invalid value; no combination with them is checked.
    """
    if run.coefficients is not None:
        return []
    return [
        *_check_correction(run, scopes, wrong),
        *_check_time(run, wrong),
        *_check_replay(scopes),
        *([] if "objective" in wrong else _check_descent(config, run, scopes, wrong)),
    ]


def _check_time(run: RunParameters, wrong: Collection[str]) -> list[str]:
    if run.max_minutes is None or not run.one_sweep or {"objective", "metric"} & set(wrong):
        return []
    return [
        "parameters (top level): `objective: layer` with `metric: identity` takes no "
        "`max_minutes`, as its one sweep is always made; set another objective or "
        "`metric: sensitivity`, or remove it"
    ]


def unread_by_replay(scopes: Iterable[Scope]) -> str | None:
    """What a replay says of parameters that belong to a fit, if there are any."""
    given = dict.fromkeys(name for scope in scopes for name in scope.settings)
    unread = [n for n in given if n not in REPLAYED and OWNERS[n] is not ModelParameters]
    if not unread:
        return None
    return (
        f"`coefficients` replays an earlier merge, with its corrections: nothing is fitted, and "
        f"{quoted(unread)} {'is' if len(unread) == 1 else 'are'} not read"
    )


def _check_replay(scopes: list[Scope]) -> list[str]:
    given = {name for scope in scopes if scope.level == "top" for name in scope.settings}
    if "changed_models" not in given:
        return []
    return [
        "parameters (top level): `changed_models` is for a replay; name its `coefficients`, or "
        "remove it"
    ]


def _check_descent(
    config: MergeConfiguration, run: RunParameters, scopes: list[Scope], wrong: Collection[str]
) -> list[str]:
    where = "parameters (top level)"
    given = {name: None for scope in scopes if scope.level == "top" for name in scope.settings}
    unread = [name for name in given if name in LogitsParameters.model_fields]
    if run.objective == "layer":
        if not unread:
            return []
        return [
            f"{where}: `objective: layer` takes no {quoted(unread)}; set `objective: logits` or "
            f"`objective: layer+logits`, or remove {'it' if len(unread) == 1 else 'them'}"
        ]
    problems = []
    if run.objective == "logits" and "metric" in given:
        problems.append(
            f"{where}: `objective: logits` takes no `metric`, as it fits no layers; set "
            f"`objective: layer+logits`, or remove it"
        )
    if "mofo_fraction" in given and run.optimizer != "mofo" and "optimizer" not in wrong:
        problems.append(
            f"{where}: `optimizer: {run.optimizer}` takes no `mofo_fraction`; set `optimizer: "
            f"mofo`, or remove it"
        )
    if run.weighted_overlap and config.base_model is None:
        problems.append(
            f"{where}: `weighted_overlap` is {run.weighted_overlap:g}, but the configuration names "
            f"no `base_model` to take task vectors from; name one, or set `overlap`"
        )
    if run.nonlinearity != "none":
        problems += [f"{where}: {p}" for p in _check_nonlinearity(config, run, scopes)]
    return problems


def _check_correction(
    run: RunParameters, scopes: Iterable[Scope], wrong: Collection[str]
) -> list[str]:
    """Problems with corrections, which may differ from tensor to tensor."""
    if "correction" in wrong:
        return []
    given = [scope.settings for scope in scopes]
    settings = [own["correction"] for own in given if "correction" in own]
    kinds = {SPECS["correction"].validate(v) for setting in settings for v in scalars(setting)}
    if all(isinstance(setting, list) for setting in settings):  # other tensors have the default
        kinds.add(TensorParameters().correction)
    reads = "low_rank" in kinds or ("full" in kinds and run.objective != "layer")
    if not reads and any("correction_rank" in own for own in given):
        return [
            "`correction_rank` is read by `correction: low_rank`, and beside `full` by a descent; "
            "set one of these, or remove it"
        ]
    return []


def _check_nonlinearity(
    config: MergeConfiguration, run: RunParameters, scopes: list[Scope]
) -> list[str]:
    """Problems with a nonlinearity that cannot produce some starting coefficients.

    Starts that depend on weights, on filters or on a file are checked with the tensors' specs.
    """
    if run.objective == "layer+logits":
        return [
            f"`nonlinearity: {run.nonlinearity}` cannot produce every coefficient that the layer "
            f"fits may find, and `objective: layer+logits` starts from those; set `objective: "
            f"logits`, or `nonlinearity: none`"
        ]
    settings = [s.settings["sum_to_one"] for s in scopes if "sum_to_one" in s.settings]
    values = [SPECS["sum_to_one"].validate(v) for setting in settings for v in scalars(setting)]
    # Deviations from the average sum to zero, so some are 0 or less at every start.
    if config.base_model is None and all(values) and run.nonlinearity in ("sigmoid", "relu"):
        return [
            f"`nonlinearity: {run.nonlinearity}` has no start: with `sum_to_one` and no "
            f"`base_model`, the fit learns deviations from the average, which start at 0; set "
            f"`sum_to_one: false`, name a `base_model`, or take `tanh` or `none`"
        ]
    return []


def quoted(names: Iterable[str]) -> str:
    """Names for a message: each in backticks, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)
