"""Where a model's files are: in a folder, or in the Hub's cache."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from mergekit.common import ModelPath

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.host.compat import ShardedTensorIndex

_READ = (".json", ".model", ".jinja", ".safetensors", ".bin")
"""Ends of the names of files that a model or an adapter is read from."""

_BEGINNING, _LARGEST = 1 << 16, 1 << 27
"""Bytes of a file's beginning; bytes of the largest header that safetensors allows, about."""


def find_file(path: ModelPath, name: str) -> Path | None:
    """A file of a model, downloaded if it is on the Hub; None if it cannot be had.

    Without a connection, the Hub's cache is looked at.
    """
    folder = Path(path.path)
    if folder.exists():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(path.path, name, revision=path.revision))
    except (OSError, ValueError, EntryNotFoundError):
        return None


def folder_of(path: ModelPath, cache: str | None = None) -> Path | None:
    """The folder with the files of a model that is on this machine already; None if it is not."""
    folder = Path(path.path)
    if folder.exists():
        return folder
    try:
        found = snapshot_download(
            path.path, revision=path.revision, cache_dir=cache, local_files_only=True
        )
    except (OSError, ValueError):
        return None
    return Path(found)


def holds_weights(folder: Path) -> bool:
    """Whether a folder has files with a model's weights, or an index of them."""
    names = ("model*.safetensors*", "pytorch_model*.bin*")
    return any(any(folder.glob(name)) for name in names)


def is_adapter(path: ModelPath) -> bool:
    """Whether a path names an adapter alone: its configuration, without a model beside it."""
    folder = Path(path.path)
    if folder.exists():
        return (folder / "adapter_config.json").is_file() and not holds_weights(folder)
    if find_file(path, "config.json") is not None:
        return False
    return find_file(path, "adapter_config.json") is not None


def stored_index(folder: Path) -> ShardedTensorIndex:
    """Mergekit's index of the files of a model.

    Raises:
        ArchitectureError: there are no such files, or some are missing.
    """
    try:
        index: ShardedTensorIndex = ShardedTensorIndex.from_disk(str(folder))
    except RuntimeError as error:
        raise _no_weights(folder) from error
    missing = [s.filename for s in index.shards if not (folder / s.filename).is_file()]
    if missing:
        raise ArchitectureError(
            f"{folder}: {', '.join(missing[:3])} is missing ({len(missing)} of "
            f"{len(index.shards)} files that its index names); copy or download the model again"
        )
    return index


def model_files(folder: Path) -> list[Path]:
    """The files that a model or an adapter is read from."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _READ)


def stamp(file: Path) -> str:
    """Name, size and time of a file: enough to see that it was replaced, without reading it.

    In the Hub's cache, the name of the file that a link leads to is a digest of its content.
    """
    own = file.resolve()
    status = own.stat()
    return f"{file.name} {own.name} {status.st_size} {status.st_mtime_ns}"


def header_of(file: Path) -> bytes:
    """The header of a safetensors file, or the beginning of another one."""
    with file.open("rb") as opened:
        first = opened.read(8)
        size = int.from_bytes(first, "little") if file.suffix == ".safetensors" else _BEGINNING
        return first + opened.read(min(size, _LARGEST))


def _no_weights(path: Path) -> ArchitectureError:
    """The error that there are no weights where a model should be."""
    required = (
        f"{path}: required model.safetensors or pytorch_model.bin, or the index of their shards"
    )
    packed = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if packed and packed[0].suffix.lower() == ".gguf":
        file = packed[0]
        return ArchitectureError(
            f"{required}, got the GGUF file {file.name}. Merge the model that it was made from, or "
            f'write it out as plain weights: python -c "from transformers import '
            f"AutoModelForCausalLM as M, AutoTokenizer as T, GgufConfig as G; "
            f"a = dict(pretrained_model_name_or_path='{file.parent}', gguf_file='{file.name}'); "
            f"M.from_pretrained(**a, quantization_config=G(dequantize=True))"
            f".save_pretrained('PLAIN'); "
            f"T.from_pretrained(**a).save_pretrained('PLAIN')\" (needs `pip install gguf`)"
        )
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    return ArchitectureError(
        f"{required}, got "
        + (f"a folder with {', '.join(names[:8])}" if names else f"a {_kind(path)}")
    )


def _kind(path: Path) -> str:
    return "file" if path.is_file() else "folder without files"
