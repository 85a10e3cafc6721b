"""Models on the Hub: a plan reads the headers of their weights, and downloads none of these.

A stand-in for a model is a folder that has its configuration and, of every file of weights, the
header, in a file of the same length. Nothing else is written there, so that it takes no room on a
disk that knows sparse files. Loaders find in it what they find in a downloaded model, as long as
they read no values.
"""

import json
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError, first_line, inside
from mergekit_dam.host.files import find_file, folder_of
from mergekit_dam.host.loaders import PlainLoader
from mergekit_dam.host.references import loader_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The files that mergekit looks for."""

_CONFIGURATION = "config.json"


def header_loader(
    model: ModelReference, options: MergeOptions, scratch: Path
) -> PlainLoader | None:
    """A loader of a Hub model that knows its headers, and has no values.

    Args:
        model: the model; its adapter is left aside.
        options: options of the merge.
        scratch: an empty folder for the stand-in.

    Returns:
        The loader, of the cache if the model was downloaded before; None where mergekit's own does
        it: for folders, for pickled models, and where the Hub is not to be asked.

    Raises:
        DamError: the headers cannot be read, or are of a format that cannot be merged.
    """
    path: ModelPath = model.model
    if Path(path.path).exists():
        return None
    cached = _cached(path, options.transformers_cache)
    if cached is not None:
        return loader_of(cached, lazy_unpickle=options.lazy_unpickle)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None
    try:
        found = _write_stand_in(path, scratch)
    except Exception as error:  # its type depends on the HTTP client
        raise DamError(
            f"{model}: the headers of its weights cannot be read from the Hub "
            f"({first_line(error)}); try again, or download the model and name its folder"
        ) from error
    if not found:
        return None
    with inside(str(model)):
        return loader_of(scratch, lazy_unpickle=options.lazy_unpickle, has_values=False)


def _cached(path: ModelPath, cache: str | None) -> Path | None:
    """The folder of a model that was downloaded before; None if files of weights are missing."""
    folder = folder_of(path, cache)
    if folder is None:
        return None
    index = folder / INDEX
    shards = _shards(index.read_bytes()) if index.exists() else [SINGLE]
    return folder if all((folder / shard).exists() for shard in shards) else None


def _shards(index: bytes) -> list[str]:
    """The files of weights that an index names."""
    return sorted(set(json.loads(index)["weight_map"].values()))


def _write_stand_in(path: ModelPath, scratch: Path) -> bool:
    """Write the stand-in of a model; False if it has no weights in safetensors."""
    hub = huggingface_hub.HfFileSystem()
    listed: list[Any] = hub.ls(path.path, revision=path.revision)
    sizes: dict[str, int] = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listed}
    shards = [SINGLE]
    config = find_file(path, _CONFIGURATION)
    if config is not None:
        (scratch / _CONFIGURATION).write_bytes(config.read_bytes())
    if INDEX in sizes:
        index = hub.cat_file(f"{path.path}/{INDEX}", revision=path.revision)
        (scratch / INDEX).write_bytes(index)
        shards = _shards(index)
    elif SINGLE not in sizes:
        return False
    for shard in shards:
        # Without a cache, exactly the bytes that are asked for are sent.
        with hub.open(
            f"{path.path}/{shard}", "rb", revision=path.revision, cache_type="none"
        ) as remote:
            start = remote.read(8)
            (length,) = struct.unpack("<Q", start)
            header = remote.read(min(length, sizes[shard]))
        with (scratch / shard).open("wb") as file:
            file.write(start + header)
            file.truncate(sizes[shard])
    return True
