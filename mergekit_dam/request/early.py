"""Problems of a configuration that can be told at once: mergekit takes seconds to be imported.

They are among those that the whole check finds, which repeats them with all others.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_dam.calibration.mixture import problems_of
from mergekit_dam.errors import ConfigError
from mergekit_dam.parameters import NAME, RunParameters
from mergekit_dam.request.document import Document, decoded, single
from mergekit_dam.request.help import OWNERS

_INPUTS = ("models", "slices", "modules")


def early_problems(file: Path) -> list[str]:
    """What is wrong at first sight with a file that holds a dam configuration.

    Of another method's file, of several documents and of what cannot be read, nothing is said.
    """
    try:
        document = single(decoded(file.read_bytes()))
    except (OSError, ConfigError):
        return []
    tree = document.tree
    if not isinstance(tree, Mapping) or tree.get("merge_method") != NAME:
        return []
    settings = list(_settings(tree, ""))
    unknown: dict[str, list[str]] = {}
    for label, _, own in settings:
        for name in own:
            if isinstance(name, str) and name not in OWNERS and closest_parameter(name):
                unknown.setdefault(name, []).append(label)
    return [
        *check_inputs(tree),
        *misplaced_parameters(document),
        *(f"{', '.join(at)}: {misspelt_parameter(name)}" for name, at in unknown.items()),
        *_texts(tree, settings),
    ]


def check_inputs(tree: Mapping[Any, Any]) -> list[str]:
    """The problem that models, slices and modules are all missing, or more than one is there."""
    given = [key for key in _INPUTS if tree.get(key)]
    if len(given) == 1:
        return []
    if given:
        return [f"required one of `models`, `slices` and `modules`, got {' and '.join(given)}"]
    return ["required `models` (or `slices`, or `modules`) with the models to merge, got none"]


def misplaced_parameters(document: Document) -> list[str]:
    """Parameters of dam that stand at the top level, where mergekit would drop them."""
    return [outside("the configuration", key) for key in document.tree if key in OWNERS]


def outside(where: str, name: Any) -> str:
    """The problem that a parameter stands beside `parameters:`."""
    return f"{where}: `{name}` stands outside of `parameters:`; move it inside"


def closest_parameter(name: str) -> str | None:
    """The parameter of dam that was probably meant."""
    return next(iter(difflib.get_close_matches(name, OWNERS, n=1)), None)


def misspelt_parameter(name: str) -> str:
    """The problem with a name that is no parameter of any method."""
    close = closest_parameter(name)
    hint = f"; did you mean `{close}`?" if close else f"; dam knows {', '.join(sorted(OWNERS))}"
    return f"unknown parameter `{name}`{hint}"


def _settings(tree: Any, path: str) -> Iterator[tuple[str, str | None, Mapping[Any, Any]]]:
    """Every `parameters` of a tree: its place, the model that it is of, and its values."""
    if isinstance(tree, list):
        for index, entry in enumerate(tree):
            yield from _settings(entry, f"{path}[{index}]")
    if not isinstance(tree, Mapping):
        return
    model = str(tree["model"]) if "model" in tree else None
    own = tree.get("parameters")
    if isinstance(own, Mapping):
        label = path if model is None else f"{path} ({model})"
        yield label or "parameters (top level)", model, own
    for key in ("models", "slices", "sources", "modules"):
        yield from _settings(tree.get(key), f"{path}.{key}".removeprefix("."))
    if path == "modules":
        for name, entry in tree.items():
            yield from _settings(entry, f"{path}.{name}")


def _texts(
    tree: Mapping[Any, Any], settings: list[tuple[str, str | None, Mapping[Any, Any]]]
) -> list[str]:
    """Problems with the calibration sources of models, where no file of coefficients is given."""
    top = next((own for label, _, own in settings if label == "parameters (top level)"), {})
    samples = top.get("samples")
    if top.get("coefficients") or type(samples) not in (int, type(None)):
        return []
    count = samples or RunParameters().samples
    return [
        f"calibration of {model}: {problem}"
        for _, model, own in settings
        if model is not None
        and isinstance(own.get("calibration"), (str, list))
        and own.get("loss_weight", 1) != 0
        for problem in _problems(own["calibration"], count)
    ]


def _problems(value: str | list[Any], samples: int) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    return problems_of(tuple(texts), samples) if all(isinstance(t, str) for t in texts) else []
