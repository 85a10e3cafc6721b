"""A configuration of dam from names and texts, or from a configuration and texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_dam.configure.convert import Converted, converted, merged_lists, model_entries
from mergekit_dam.errors import DamError
from mergekit_dam.parameters import NAME
from mergekit_dam.request.check import check_configuration
from mergekit_dam.request.document import single
from mergekit_dam.request.reading import tree_of_any_method, validated

DTYPE = "bfloat16"
"""Dtype of a merge that nothing else is known of."""


def of_names(models: Mapping[str, str], base: str | None) -> Converted:
    """The configuration of a merge of some models.

    Args:
        models: Model -> its calibration text.
        base: The model that they were fine-tuned from.
    """
    tree: dict[str, Any] = {"merge_method": NAME}
    if base is not None:
        tree["base_model"] = base
    tree["models"] = [{"model": model} for model in models]
    tree["dtype"] = DTYPE
    return Converted(tree)


def of_file(file: Path) -> Converted:
    """The configuration of dam that is nearest to the one in a file.

    Raises:
        ConfigError: The file cannot be read, or mergekit would refuse it.
    """
    return converted(tree_of_any_method(file))


def with_texts(found: Converted, texts: Mapping[str, str]) -> Converted:
    """The same with a calibration text for every model that needs one.

    Args:
        texts: Model, or the last part of its path, -> its text.

    Raises:
        DamError: A model has no text, or a text has no model.
    """
    tree = found.tree
    learning = any(len(own) > 1 for own in merged_lists(tree))
    included = bool((tree.get("parameters") or {}).get("include_base"))
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in model_entries(tree):
        if included or entry["model"] != tree.get("base_model"):
            entries.setdefault(entry["model"], []).append(entry)
    by_model = {model_named(name, entries): text for name, text in texts.items()}
    shared = (tree.get("parameters") or {}).get("calibration")
    missing = []
    for model, own in entries.items():
        has = shared or any((e.get("parameters") or {}).get("calibration") for e in own)
        if model in by_model:
            own[0].setdefault("parameters", {})["calibration"] = by_model[model]
        elif learning and not has:
            missing.append(model)
    if missing:
        raise DamError(
            "required a text of the kind that each model is good at; none was given for "
            f"{', '.join(missing)}: add `{missing[0]}=TEXT` (a file, a folder or a dataset of the "
            f"Hub), or `{missing[0]}=self`, and the model writes it"
        )
    return found


def model_named(name: str, known: Mapping[str, Any]) -> str:
    """The model that a name means: the whole of it, or the last part of its path."""
    if name in known:
        return name
    found = [model for model in known if Path(model).name == name]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(known) or "none that takes a text"
    raise DamError(f"{name} names {len(found) or 'none'} of the models: {listed}")


def checked(text: str) -> None:
    """Check a configuration as a merge does, before models are read.

    Raises:
        ConfigError: With everything that is wrong.
    """
    document = single(text)
    validated(document)
    config = MergeConfiguration.model_validate(document.tree)
    check_configuration(config, document, texts=True)
