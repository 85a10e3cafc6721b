"""Keys of the YAML that mergekit drops without a word, and parameters that dam does not know."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from pydantic import BaseModel

from mergekit_dam.parameters import NAME
from mergekit_dam.request.document import Document
from mergekit_dam.request.early import misspelt_parameter, outside
from mergekit_dam.request.help import OWNERS

_NESTED: dict[str, type[BaseModel]] = {
    "models": InputModelDefinition,
    "slices": OutputSliceDefinition,
    "sources": InputSliceDefinition,
}


def unknown_keys(document: Document) -> list[str]:
    """Problems with keys that mergekit would drop.

    Not among them: `name`, which mergekit-multi reads, and definitions at top level that the rest
    of the file refers to by an anchor.
    """
    close = {key for key in document.anchored if key in OWNERS or _close(key, MergeConfiguration)}
    known = {"name", *(document.anchored - close)}
    return _unknown_keys(document.tree, MergeConfiguration, "the configuration", known)


def _unknown_keys(
    tree: Any, schema: type[BaseModel], where: str, known: Collection[Any] = ()
) -> list[str]:
    if not isinstance(tree, Mapping):
        return []
    problems = []
    for key in tree:
        if key in schema.model_fields or key in known:
            continue
        if key in OWNERS:
            problems.append(outside(where, key))
            continue
        close = _close(key, schema)
        hint = f"did you mean `{close}`?" if close else "mergekit would ignore it; remove it"
        problems.append(f"{where}: unknown key `{key}`; {hint}")
    for key, inner in _NESTED.items():
        entries = tree.get(key)
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            problems += _unknown_keys(entry, inner, _join(where, f"{key}[{index}]"))
    modules = tree.get("modules")
    for name, entry in modules.items() if isinstance(modules, Mapping) else ():
        problems += _unknown_keys(entry, OutputModuleDefinition, _join(where, f"modules.{name}"))
    return problems


def _close(key: object, schema: type[BaseModel]) -> str | None:
    """The key of mergekit's that was probably meant."""
    return next(iter(difflib.get_close_matches(str(key), schema.model_fields, n=1)), None)


def _join(where: str, key: str) -> str:
    return key if where == "the configuration" else f"{where}.{key}"


def unknown_parameter(name: str) -> str:
    """The problem with an unknown parameter, and what was probably meant."""
    if name in MergeConfiguration.model_fields:
        return (
            f"`{name}` stands inside of `parameters:`, but it is no parameter of a method; move "
            f"`{name}` out, to the top level of the configuration"
        )
    others = methods_with(name)
    if others:
        return f"`{name}` is a parameter of {', '.join(others)}, not of dam; remove it"
    return misspelt_parameter(name)


def methods_with(name: str) -> list[str]:
    """The other merge methods that have a parameter of this name."""
    return sorted(
        method.spec.name
        for method in merge_methods.registered_methods()
        if method.spec.name != NAME and any(p.name == name for p in method.spec.parameters)
    )
