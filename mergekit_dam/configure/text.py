"""A configuration as YAML with comments."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from mergekit_dam.parameters import RunParameters

_WIDTH = 96
_COMMENTS = {
    "base_model": "What the models were fine-tuned from. Coefficients are those of their task "
    "vectors.",
    "models": "Each has some `calibration`: text of the kind that it is good at, and that the "
    "merge is not judged by.",
    "slices": "The text of a model counts in every slice.",
    "tokenizer": "For models whose tokenizers differ.",
    "dtype": "In which the merge is computed and written.",
}
_ORDER = ("merge_method", "base_model", "models", "slices", "modules", "parameters")
_SUGGESTED = (
    ("samples", "sequences of each model; time grows in proportion"),
    ("sequence_length", "tokens per sequence: as many as the skills need"),
)
_SHORT = (
    "# The shortest fit, instead of the best one:",
    "#   objective: layer",
    "#   metric: identity",
)


def written(tree: Mapping[str, Any], notes: Iterable[str]) -> str:
    """A configuration of dam as text; what it says is the same with and without comments.

    Args:
        tree: The configuration.
        notes: Sentences for its beginning, such as what could not be kept.
    """
    lines = [
        "# Written by `mergekit-dam init`.",
        "#   mergekit-dam plan THIS.yaml ./out    checks it, and tells what the merge costs",
        "#   mergekit-dam merge THIS.yaml ./out   merges (mergekit-yaml does the same)",
    ]
    for note in notes:
        lines += textwrap.wrap(note, _WIDTH, initial_indent="# - ", subsequent_indent="#   ")
    rest = [key for key in tree if key not in _ORDER]
    for key in (*_ORDER, *rest):
        if key == "parameters":
            lines += ["", *_parameters(tree.get(key) or {})]
        elif key in tree:
            comment = _COMMENTS.get(key)
            lines += [
                "",
                *(
                    textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="# ")
                    if comment
                    else []
                ),
            ]
            lines += _yaml({key: tree[key]})
    return "\n".join(lines) + "\n"


def _parameters(given: Mapping[str, Any]) -> list[str]:
    """The parameters; those that are set most often with what they do."""
    lines = ["parameters:"]
    defaults = RunParameters()
    for name, comment in _SUGGESTED:
        value = given.get(name, getattr(defaults, name))
        entry = _yaml({name: value})
        lines += [f"  {entry[0]}  # {comment}", *(f"  {line}" for line in entry[1:])]
    others = {name: value for name, value in given.items() if name not in dict(_SUGGESTED)}
    lines += [f"  {line}" for line in _yaml(others)] if others else []
    if "objective" not in given and "metric" not in given:
        lines += [f"  {line}" for line in _SHORT]
    return lines


def _yaml(tree: Mapping[str, Any]) -> list[str]:
    """Lines of YAML; the innermost lists and mappings are on one line."""
    lines: list[str] = []
    for key, value in tree.items():
        flow = None if isinstance(value, (list, dict)) else False
        text = yaml.safe_dump(
            {key: value},
            sort_keys=False,
            allow_unicode=True,
            width=_WIDTH,
            default_flow_style=flow,
        )
        lines += text.splitlines()
    return lines
