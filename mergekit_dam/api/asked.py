"""A configuration in any form that a Python program may have, with texts from its memory."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_dam.api.texts import Text, documents_of, written
from mergekit_dam.command_line import resolved_device
from mergekit_dam.configure.convert import model_entries
from mergekit_dam.configure.draft import model_named
from mergekit_dam.errors import ConfigError, DamError, inside
from mergekit_dam.host import plugin
from mergekit_dam.request.document import Document, decoded, single
from mergekit_dam.request.reading import validated

Configuration: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | MergeConfiguration
"""The path of a YAML file, its content as plain values, or mergekit's own object."""


@dataclass(frozen=True)
class Asked:
    """A merge as it is asked for.

    Attributes:
        config: mergekit's configuration.
        document: The plain values that it was made of.
        text: YAML for the record, in which texts in memory have names in the place of paths.
        folder: Folder of the configuration file; None if there is none.
        named: Path of a text in memory -> its name.
    """

    config: MergeConfiguration
    document: Document
    text: str
    folder: Path | None = None
    named: Mapping[str, str] = field(default_factory=dict)


def asked(configuration: Configuration, texts: Mapping[str, Text] | None, scratch: Path) -> Asked:
    """Read a configuration, and give texts to its models.

    Args:
        configuration: A configuration of dam.
        texts: Model, or the last part of its path -> its calibration text.
        scratch: Folder for texts in memory.

    Raises:
        DamError: With everything that is wrong with it at first sight.
    """
    plugin.install()  # a list under `calibration` is none of mergekit's parameters
    file = Path(configuration) if isinstance(configuration, (str, os.PathLike)) else None
    place = "the configuration" if file is None else str(file)
    with inside(place):
        document, text = _document(configuration)
        config = validated(document)
    folder = None if file is None else file.absolute().parent
    if not texts:
        return Asked(config, document, text, folder)
    places, named = _places(texts, scratch)
    tree = {key: own for key, own in document.tree.items() if key not in document.anchored}
    with_places = Document(_with_texts(tree, places))
    names = {name: named.get(place, place) for name, place in places.items()}
    text = _yaml(_with_texts(tree, names))
    with inside(place):
        config = validated(with_places)
    return Asked(config, with_places, text, folder, named)


def merge_options(device: str, options: Mapping[str, Any]) -> MergeOptions:
    """Mergekit's options.

    Raises:
        DamError: An option that mergekit does not have, or a value that it refuses.
    """
    unknown = [name for name in options if name not in MergeOptions.model_fields]
    if unknown:
        known = ", ".join(sorted(MergeOptions.model_fields))
        raise DamError(f"mergekit has no option {', '.join(unknown)}; it has {known}")
    try:
        return MergeOptions(device=resolved_device(device), **options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamError(f"option {where}: {first['msg']}, got {first['input']!r}") from error


def _document(configuration: Any) -> tuple[Document, str]:
    """The values of a configuration, and its YAML."""
    if isinstance(configuration, (str, os.PathLike)):
        try:
            text = decoded(Path(configuration).read_bytes())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"required a YAML file, which cannot be read ({reason})") from error
        return single(text), text
    if isinstance(configuration, MergeConfiguration):
        text = configuration.to_yaml()
        return single(text), text
    if isinstance(configuration, Mapping):
        text = _yaml(configuration)
        return single(text), text
    raise ConfigError(
        "required the path of a YAML file, a mapping or a MergeConfiguration, got "
        f"{type(configuration).__name__}"
    )


def _places(texts: Mapping[str, Text], scratch: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Model -> where its text is, and path -> name of those that are in memory."""
    places: dict[str, str] = {}
    named: dict[str, str] = {}
    for number, (model, text) in enumerate(texts.items()):
        documents = documents_of(text, str(model))
        if documents is None:
            places[str(model)] = str(text)
            continue
        folder = scratch / str(number)  # models of one name may have other paths
        folder.mkdir()
        file = written(documents, folder / f"{Path(str(model)).name}.jsonl")
        places[str(model)] = str(file)
        own = f"memory/{file.name}"
        named[str(file)] = own if own not in named.values() else f"memory/{number}/{file.name}"
    return places, named


def _with_texts(tree: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """A copy of a configuration in which models have the texts."""
    made: dict[str, Any] = copy.deepcopy(dict(tree))
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in model_entries(made):
        entries.setdefault(str(entry["model"]), []).append(entry)
    for name, text in texts.items():
        own = entries[model_named(name, entries)][0]
        own["parameters"] = {**(own.get("parameters") or {}), "calibration": text}
    return made


def _yaml(tree: Mapping[str, Any]) -> str:
    try:
        return yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"required plain values, as in YAML: {error}") from error


def _plain(value: Any) -> Any:
    """The same values, paths as texts; nothing in it is the same object twice."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return value
