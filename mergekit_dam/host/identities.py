"""The files that a model is read from, and how it is told from others by them."""

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit.common import ModelPath, ModelReference

from mergekit_dam.coefficients.rows import Identity
from mergekit_dam.digests import sha256_of
from mergekit_dam.host.compat import LoaderCache
from mergekit_dam.host.files import folder_of, holds_weights, stored_index
from mergekit_dam.host.names import Names

ADAPTER = "adapter/"
"""What stands before the names of an adapter's files."""

_ADAPTER_WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_BESIDE = (
    "config.json",
    "generation_config.json",
    "*.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "*.py",
)
"""Files that a merge reads beside the weights, where there are any."""


def weight_files(model: ModelReference) -> dict[str, Path]:
    """The files that hold the weights of a model and of its adapter, by name.

    Empty if they are not on this machine.
    """
    folder = _folder(model.model)
    if folder is None or not holds_weights(folder):
        return {}
    found = {shard.filename: folder / shard.filename for shard in stored_index(folder).shards}
    adapter = None if model.lora is None else _folder(model.lora)
    for name in _ADAPTER_WEIGHTS if adapter is not None else ():
        if adapter is not None and (adapter / name).is_file():
            found[f"{ADAPTER}{name}"] = adapter / name
    return found


def files_read(path: ModelPath) -> dict[str, Path]:
    """All files that a merge reads of a model, or of an adapter, by name."""
    folder = _folder(path)
    if folder is None:
        return {}
    names = {file.name for file in folder.iterdir() if file.is_file()}
    read = {n for n in names if any(fnmatch.fnmatch(n, own) for own in _BESIDE)}
    read |= names & set(_ADAPTER_WEIGHTS)
    if holds_weights(folder):
        read |= {shard.filename for shard in stored_index(folder).shards}
    return {name: folder / name for name in sorted(read)}


def revision_of(path: ModelPath) -> str | None:
    """The commit of a model from the Hub; None for a local one."""
    if Path(path.path).exists():
        return None
    folder = _folder(path)
    return path.revision if folder is None else folder.name


def identities(models: Iterable[ModelReference], names: Names) -> dict[ModelReference, Identity]:
    """How models are told from others: by their names, and by sha256 of their weights."""
    return {model: _identity(model, names, weight_files(model)) for model in models}


def named_only(model: ModelReference, names: Names) -> Identity:
    """A model that is known by its name alone."""
    return _identity(model, names, {})


def _identity(model: ModelReference, names: Names, files: Mapping[str, Path]) -> Identity:
    digests = {name: sha256_of(file) for name, file in sorted(files.items())}
    return Identity(names.of(model), digests, (str(model),))


def _folder(path: ModelPath) -> Path | None:
    cache = LoaderCache().hf_cache_dir
    found = folder_of(path, cache)
    return folder_of(path) if found is None and cache else found  # adapters are in peft's own
