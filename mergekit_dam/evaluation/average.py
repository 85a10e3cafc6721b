"""The plain average of some models, which merges are compared with: mergekit's `linear`."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.host.failures import mergekit_errors
from mergekit_dam.host.plugin import run_merge
from mergekit_dam.parameters import RunParameters
from mergekit_dam.request.reading import tree_of_any_method

LINEAR = "linear"
WRITTEN = "mergekit_config.yml"
"""File in which mergekit keeps the configuration of a merge."""

_KEPT = ("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template")


def of_models(models: Sequence[str]) -> dict[str, Any]:
    """The configuration of the average of models with equal weights."""
    return {
        "merge_method": LINEAR,
        "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
    }


def of_configuration(file: Path) -> dict[str, Any]:
    """The configuration of the average of the models of another merge, by its `weight`.

    The base counts only if that merge has `include_base`.

    Raises:
        ConfigError: The file cannot be read, or names no models.
    """
    tree = tree_of_any_method(file)
    top = tree.get("parameters") or {}
    base = tree.get("base_model")
    included = bool(top.get("include_base", RunParameters().include_base))
    found = {"merge_method": LINEAR, **{key: tree[key] for key in _KEPT if key in tree}}
    if tree.get("models"):
        found["models"] = _inputs(tree["models"], base, included, top)
        if included and base is not None and base not in [m["model"] for m in found["models"]]:
            found["models"].append(_input({"model": base}, top))
    if tree.get("slices"):
        found["slices"] = _slices(tree["slices"], base, included, top)
    if tree.get("modules"):
        found["modules"] = {
            name: {
                key: (_slices if key == "slices" else _inputs)(own[key], base, included, top)
                for key in ("models", "slices")
                if own.get(key)
            }
            for name, own in tree["modules"].items()
        }
    return found


def _slices(
    entries: Sequence[Mapping[str, Any]], base: Any, included: bool, top: Mapping[str, Any]
) -> list[dict[str, Any]]:
    return [{"sources": _inputs(e["sources"], base, included, top)} for e in entries]


def _inputs(
    entries: Sequence[Mapping[str, Any]], base: Any, included: bool, top: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The models of a list but for the base, which is alone in a slice that copies it."""
    others = [entry for entry in entries if included or entry["model"] != base]
    return [_input(entry, top) for entry in others or entries]


def _input(entry: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    own = entry.get("parameters") or {}
    weight = own.get("weight", top.get("weight", 1.0))
    rest = {key: entry[key] for key in ("model", "layer_range") if key in entry}
    return {**rest, "parameters": {"weight": weight}}


@contextlib.contextmanager
def average_made(
    configuration: Mapping[str, Any], *, device: str, trust_remote_code: bool
) -> Iterator[str]:
    """Merge into a temporary folder, which is removed at the end.

    Yields:
        The folder of the average.

    Raises:
        DamError: mergekit cannot make it.
    """
    with tempfile.TemporaryDirectory(prefix="dam-average-") as place:
        folder = Path(place) / LINEAR
        options = MergeOptions(
            device=device,
            trust_remote_code=trust_remote_code,
            lora_merge_cache=str(Path(place) / "adapters"),
            write_model_card=False,
            quiet=True,
        )
        with mergekit_errors():
            run_merge(MergeConfiguration.model_validate(dict(configuration)), str(folder), options)
        yield str(folder)
