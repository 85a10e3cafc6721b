"""The files that hold a model's weights: that they are whole is checked from their headers.

mergekit and transformers open a damaged file when they need it, and their errors do not name it.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mergekit_dam.errors import CheckpointError, first_line, listed
from mergekit_dam.untrusted import parsed_json

if TYPE_CHECKING:
    from torch import Tensor

_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
_AGAIN = "copy or download it again"


def check_checkpoint(folder: Path) -> None:
    """Check the weights of a folder: one file, or the shards that an index lists.

    A folder with an adapter, or with weights in a format of another program alone, is left to
    those who read it.

    Raises:
        CheckpointError: A file is missing or damaged, or two contradict each other; the message
            names the file. No values are read.
    """
    for name in (_SAFE, _PICKLED):
        single, index = folder / name, folder / f"{name}.index.json"
        if index.exists():
            _check_index(index, single)
            return
        if single.exists() or single.is_symlink():
            tensors_in(single)
            return
    if (folder / "adapter_config.json").exists() or any(folder.glob("*.gguf")):
        return
    found = sorted(path.name for path in folder.iterdir())
    raise CheckpointError(
        f"{folder}: required the weights, {_SAFE} or {_PICKLED} or the index of their shards, got "
        f"{listed(found, 6) or 'an empty folder'}; download or copy the whole model"
    )


def _check_index(index: Path, single: Path) -> None:
    """Check the index of a sharded checkpoint, and all its shards."""
    shards: dict[str, list[str]] = {}
    for tensor, shard in _weight_map(index).items():
        shards.setdefault(shard, []).append(tensor)
    instead = f"; {single.name} beside it has weights, too: delete the one that is old"
    hint = instead if single.exists() and single.name not in shards else ""
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: required names of files in its own folder, got {shard!r}; {_AGAIN}"
            )
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{index}: lists {listed(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"in the folder; {_AGAIN}{hint}"
        )
    for shard, tensors in shards.items():
        found = tensors_in(index.parent / shard)
        absent = [] if found is None else sorted(set(tensors) - set(found))
        if absent:
            raise CheckpointError(
                f"{index.parent / shard}: has no tensor {listed(absent)}, which {index.name} says "
                f"it has; {_AGAIN}{hint}"
            )
    if hint:
        raise CheckpointError(f"{index}: transformers would read other files than mergekit{hint}")


def _weight_map(index: Path) -> Mapping[str, str]:
    """The file of every tensor, as an index says."""
    try:
        found: Any = parsed_json(index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{index}: no JSON ({first_line(error)}); {_AGAIN}") from error
    weights = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(
            f"{index}: required a `weight_map` from tensors to files, got none; {_AGAIN}"
        )
    wrong = [name for name, shard in weights.items() if not isinstance(shard, str)]
    if wrong:
        raise CheckpointError(f"{index}: no name of a file for {listed(wrong)}; {_AGAIN}")
    return weights


def tensors_in(file: Path) -> Sequence[str] | None:
    """Names of the tensors in a file; None for a pickled one, whose names would be executed.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    if file.suffix == ".safetensors":
        with opened(file) as handle:
            return list(handle.keys())
    beginning = _beginning(file)
    if beginning.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file}: damaged, its end is missing; {_AGAIN}")
    return None


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, opened: its header fits the file.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    _beginning(file)
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: damaged, or no safetensors file ({first_line(error)}); {_AGAIN}"
        ) from error
    with handle as entered:
        yield entered


def pickled(file: Path, device: str = "cpu") -> "Mapping[str, Tensor]":
    """The tensors of a pickled file by name; no code that stands in it is run.

    Args:
        device: Where the tensors go; "meta" for their shapes alone.

    Raises:
        CheckpointError: The file is missing or damaged, or holds more than tensors.
    """
    import torch

    try:
        found = torch.load(
            file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file)
        )
        tensors = isinstance(found, dict) and all(map(torch.is_tensor, found.values()))
    except Exception as error:  # an unpickler raises anything
        raise CheckpointError(
            f"{file}: damaged, or it holds more than tensors ({first_line(error)}); {_AGAIN}"
        ) from error
    if not tensors:
        raise CheckpointError(f"{file}: required tensors by name, got something else; {_AGAIN}")
    return {str(name): tensor for name, tensor in found.items()}


def _beginning(file: Path) -> bytes:
    """The first bytes of a file that may hold weights."""
    if not file.exists():
        raise CheckpointError(f"{file}: missing, or a link to nothing; {_AGAIN}")
    if not file.is_file():
        raise CheckpointError(f"{file}: required a file with weights, got a folder or a device")
    try:
        with file.open("rb") as raw:
            first = raw.read(64)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if not first:
        raise CheckpointError(f"{file}: required weights, got an empty file; {_AGAIN}")
    if first.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{file}: a pointer of Git LFS in place of the weights; run `git lfs pull` in "
            f"{file.parent}"
        )
    return first
