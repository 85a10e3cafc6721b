"""The configuration of a lock, with the places where models and texts are now."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergekit_dam.calibration.source import OPTION
from mergekit_dam.errors import DamError, inside, listed
from mergekit_dam.lock.schema import Lock, Text
from mergekit_dam.parameters import REPLAYED
from mergekit_dam.reproduce.places import Places
from mergekit_dam.request.document import single
from mergekit_dam.request.reading import validated
from mergekit_dam.untrusted import exists

_TEXTS = ("calibration", "coefficients", "start")


def tree_of(lock: Lock) -> Mapping[str, Any]:
    """The configuration of a lock as the merge had it, as plain values.

    Raises:
        ConfigError: It is none, and the lock was changed.
    """
    with inside("the configuration of the lock"):
        document = single(lock.configuration)
        validated(document)
    return dict(document.tree)


def located(
    lock: Lock, models: Mapping[str, str], texts: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """The configuration of a lock, as plain values.

    Args:
        lock: The lock.
        models: Name of a model or adapter -> what stands in its place.
        texts: Gives what stands in the place of a value of `calibration` or `start`; None to leave
            them.
    """
    alone = {
        source.adapter.name: "+".join(models[own.name] for own in (source.model, source.adapter))
        for source in lock.sources
        if source.adapter is not None
    }

    def replaced(value: Any, key: str | None = None) -> Any:
        if isinstance(value, Mapping) and "path" in value:
            return _path(value, models)
        if isinstance(value, Mapping):
            return {name: replaced(entry, name) for name, entry in value.items()}
        if isinstance(value, list):
            return [replaced(entry, key) for entry in value]
        if not isinstance(value, str):
            return value
        if key in _TEXTS:
            return value if texts is None else texts(value)
        return alone.get(value) or _model(value, models)

    found: dict[str, Any] = replaced(tree_of(lock))
    return found


def _model(value: str, models: Mapping[str, str]) -> str:
    """A value with its model, or model and adapter, replaced if it has any."""
    if value in models:
        return models[value]
    parts = value.split("+")
    return "+".join(models[part] for part in parts) if set(parts) <= models.keys() else value


def _path(value: Mapping[str, Any], models: Mapping[str, str]) -> Mapping[str, Any]:
    """Mergekit's long form of a path and a revision, replaced."""
    revision = value.get("revision")
    place = models.get(value["path"] if revision is None else f"{value['path']}@{revision}")
    if place is None:
        return value
    if exists(place):
        return {"path": place}
    path, _, commit = place.partition("@")
    return {"path": path, "revision": commit or None}


class Texts:
    """Finds the texts of a fit, and remembers the name of each place.

    Attributes:
        named: Place -> the name in the lock.
    """

    def __init__(self, lock: Lock, places: Places) -> None:
        self.named: dict[str, str] = {}
        self._places = places
        texts = [part for own in lock.calibration.values() for part in (own, *own.parts)]
        self._datasets = {own.dataset: own for own in texts if own.dataset is not None}

    def __call__(self, value: str) -> str:
        """A calibration source (or a start) with its path, or with the commit of its dataset.

        Raises:
            DamError: There is nothing by that name.
        """
        location, *options = OPTION.split(value)
        if location in ("self", "average", "random"):
            return value
        dataset: Text | None = self._datasets.get(location.partition("@")[0])
        if dataset is not None:
            commit = "" if dataset.revision is None else f"@{dataset.revision}"
            return ":".join([f"{dataset.dataset}{commit}", *options])
        kept = [self._template(option) for option in options]
        return ":".join([self._place(location), *kept])

    def _template(self, option: str) -> str:
        key, _, path = option.partition("=")
        if key != "chat_template" or path == "none":
            return option
        return f"{key}={self._place(path)}"

    def _place(self, name: str) -> str:
        found = next(self._places.of_name(name), None)
        if found is None:
            raise DamError(
                f"{name}: a fit needs this text, and it was found at none of "
                f"{listed(self._places.roots, 6)}; name its place: --texts {name}=PATH. Without "
                f"--refit no text is needed"
            )
        self.named[str(found)] = name
        return str(found)


def untracked(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose merge nothing tracks: a reproduction is not a run of its own."""
    parameters = {k: v for k, v in (tree.get("parameters") or {}).items() if k != "tracking"}
    return {**tree, "parameters": parameters}


def replay_of(tree: Mapping[str, Any], coefficients: Path | str) -> dict[str, Any]:
    """A configuration that replays coefficients in place of a fit."""
    parameters = {k: v for k, v in (tree.get("parameters") or {}).items() if k in REPLAYED}
    return {**tree, "parameters": {**parameters, "coefficients": str(coefficients)}}
