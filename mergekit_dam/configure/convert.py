"""A configuration of any merge method -> one of dam, with what changes and what cannot be kept."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_dam.errors import listed
from mergekit_dam.parameters import NAME, ModelParameters, RunParameters
from mergekit_dam.request.help import OWNERS
from mergekit_dam.request.keys import methods_with
from mergekit_dam.request.values import DTYPES

Tree = dict[str, Any]

_LINEAR = "linear"
_KEPT = ("base_model", "dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template")


@dataclass
class Converted:
    """A configuration of dam.

    Attributes:
        tree: The configuration.
        changes: Sentences that say what is another now.
        lost: Sentences that say what could not be kept, and why.
    """

    tree: Tree
    changes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def converted(tree: Mapping[str, Any]) -> Converted:
    """Make a configuration of dam from one of any method, which mergekit accepts.

    Args:
        tree: The parsed YAML.
    """
    method = tree.get("merge_method")
    found = Converted({"merge_method": NAME})
    if method != NAME:
        found.changes.append(f"`merge_method: {method}` is `{NAME}` now")
    for key, value in tree.items():
        if key == "base_model" and value is not None:
            found.tree[key] = str(ModelReference.model_validate(value))
        elif key in _KEPT:
            found.tree[key] = copy.deepcopy(value)
        elif key not in ("merge_method", "parameters", *_LISTS):
            known = key in MergeConfiguration.model_fields
            why = "it has no meaning for dam" if known else "mergekit does not know it"
            found.lost.append(f"`{key}`: {why}")
    for key in ("dtype", "out_dtype"):
        if key in found.tree and str(found.tree[key]).removeprefix("torch.") not in DTYPES:
            found.lost.append(f"`{key}: {found.tree.pop(key)}`: it is none of {', '.join(DTYPES)}")
    parameters = _parameters(tree.get("parameters"), "top level", None, method, found)
    for key in _LISTS:
        if tree.get(key):
            found.tree[key] = _LISTS[key](tree[key], key, method, found)
    if parameters:
        found.tree["parameters"] = parameters
    _settle_base(found)
    return found


def model_entries(tree: Mapping[str, Any]) -> Iterator[Tree]:
    """Every entry of a configuration that names a model."""
    yield from tree.get("models") or ()
    for entry in tree.get("slices") or ():
        yield from entry["sources"]
    for own in (tree.get("modules") or {}).values():
        yield from model_entries(own)


def merged_lists(tree: Mapping[str, Any]) -> Iterator[list[Tree]]:
    """Every list of models that are merged with each other."""
    if tree.get("models"):
        yield tree["models"]
    for entry in tree.get("slices") or ():
        yield entry["sources"]
    for own in (tree.get("modules") or {}).values():
        yield from merged_lists(own)


def _entries(entries: Any, place: str, method: Any, found: Converted) -> list[Tree]:
    made = []
    for entry in entries:
        model = str(ModelReference.model_validate(entry["model"]))
        own = {"model": model, **{key: entry[key] for key in ("layer_range",) if key in entry}}
        kept = _parameters(entry.get("parameters"), model, "model", method, found)
        unknown = sorted(set(entry) - {"model", "layer_range", "parameters"})
        found.lost += [
            f"`{key}` of {model} in {place}: mergekit does not know it" for key in unknown
        ]
        made.append({**own, **({"parameters": kept} if kept else {})})
    return made


def _slices(entries: Any, place: str, method: Any, found: Converted) -> list[Tree]:
    made = []
    for index, entry in enumerate(entries):
        where = f"{place}[{index}]"
        kept = _parameters(entry.get("parameters"), where, "group", method, found)
        found.lost += [
            f"`{key}` of {where}: dam has none per slice"
            for key in ("base_model", "residual_weight")
            if entry.get(key) is not None
        ]
        sources = _entries(entry["sources"], f"{where}.sources", method, found)
        made.append({"sources": sources, **({"parameters": kept} if kept else {})})
    return made


def _modules(modules: Any, place: str, method: Any, found: Converted) -> Tree:
    made = {}
    for name, own in modules.items():
        where = f"{place}.{name}"
        kept = _parameters(own.get("parameters"), where, "group", method, found)
        lists = {
            key: _LISTS[key](own[key], f"{where}.{key}", method, found)
            for key in ("models", "slices")
            if own.get(key)
        }
        made[name] = {**lists, **({"parameters": kept} if kept else {})}
    return made


_LISTS = {"models": _entries, "slices": _slices, "modules": _modules}


def _parameters(given: Any, where: str, level: str | None, method: Any, found: Converted) -> Tree:
    """The parameters that mean the same for dam; the others are lost."""
    kept = {}
    for name, value in (given or {}).items():
        why = _why_lost(name, value, level, method)
        if why is None:
            kept[name] = copy.deepcopy(value)
        else:
            found.lost.append(f"`{name}: {value}` of {where}: {why}")
    return kept


def _why_lost(name: str, value: Any, level: str | None, method: Any) -> str | None:
    """Why a parameter cannot be kept; None if it can."""
    if name not in OWNERS:
        others = methods_with(name)
        return f"a parameter of {listed(others)}, not of dam" if others else "no method knows it"
    if method == NAME:
        return None
    if name != "weight":
        return f"it means another thing for dam than for {method}"
    if method != _LINEAR:
        return "dam learns how much of each model is taken"
    if level == "group":
        return "it belongs to a model"
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    return None if plain else "dam starts from an average, whose weights are plain numbers"


def _settle_base(found: Converted) -> None:
    """Include a base that would be the only other model, and drop one that slices leave out."""
    tree = found.tree
    base = tree.get("base_model")
    if base is None:
        return
    models = {entry["model"] for entry in model_entries(tree)}
    included = (tree.get("parameters") or {}).get("include_base", RunParameters().include_base)
    lists = [[entry["model"] for entry in own] for own in merged_lists(tree)]
    sliced = not tree.get("models")
    if sliced and any(len(own) > 1 and base not in own for own in lists):
        del tree["base_model"]
        found.lost.append(
            f"`base_model: {base}`: a base has to be in every slice that merges several models"
        )
        return
    if included:
        return
    if len(models - {base}) == 1 and any(len({*own, base}) > 1 for own in lists):
        tree["parameters"] = {**(tree.get("parameters") or {}), "include_base": True}
        if tree.get("models") and base not in models:
            tree["models"].insert(0, {"model": base})
        found.changes.append(
            f"the base {base} is merged like the other model (`include_base: true`)"
        )
        return
    if tree.get("models"):
        tree["models"] = [entry for entry in tree["models"] if entry["model"] != base]
    for entry in model_entries(tree):
        if entry["model"] == base:
            own = entry.get("parameters") or {}
            for name in [name for name in own if name in ModelParameters.model_fields]:
                del own[name]
