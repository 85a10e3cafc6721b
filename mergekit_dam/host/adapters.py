"""Adapters: their base, the rows that they add, and their merge into the base by peft.

A merged adapter is kept in a folder whose name holds a digest of everything that it was made from.
It is written under another name and renamed when it is complete; a lock keeps others out meanwhile.
So an adapter that was trained again is merged again, and a half-written folder is never read.
"""

import contextlib
import hashlib
import logging
import shutil
from functools import lru_cache
from pathlib import Path

import peft
import torch
from filelock import FileLock
from mergekit.common import ModelPath, ModelReference

from mergekit_dam.errors import ArchitectureError, ConfigError, DamError, first_line
from mergekit_dam.host.files import find_file, model_files, stamp
from mergekit_dam.model import checkpoint
from mergekit_dam.model.build import auto_class, build_model
from mergekit_dam.vocabulary.tokenizers import load_tokenizer

LOG = logging.getLogger(__name__)

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def base_of(adapter: ModelPath) -> ModelPath:
    """The model that an adapter was trained on, as its own configuration names it.

    Raises:
        ConfigError: it names none, or one that cannot be found.
    """
    settings = peft.PeftConfig.from_pretrained(adapter.path, revision=adapter.revision)
    base = ModelPath(path=settings.base_model_name_or_path or "", revision=settings.revision)
    if not base.path or find_file(base, "config.json") is None:
        raise ConfigError(
            f"{adapter} is an adapter, and the model that its {_CONFIG} names as its base "
            f"({base.path or 'none'}) cannot be found; write BASE+{adapter} in its place"
        )
    return base


@lru_cache(maxsize=64)  # transformers builds the model's skeleton for it
def adapter_rows(adapter: ModelPath, base: ModelReference, trust_remote_code: bool) -> int | None:
    """The number of rows of an adapter's embedding or head; None if it has neither.

    Raises:
        ConfigError: there is no adapter.
    """
    shapes = _shapes(_files(adapter)[1])
    model = build_model(base.config(trust_remote_code), trust_remote_code=trust_remote_code)
    paths = {id(module): f"base_model.model.{path}" for path, module in model.named_modules()}
    embedding = paths[id(model.get_input_embeddings())]
    ends = (".weight", ".base_layer.weight", ".lora_B.weight")
    found = [
        *(shapes.get(f"{embedding}{end}") for end in ends[:2]),
        *(shapes.get(f"{paths.get(id(model.get_output_embeddings()))}{end}") for end in ends),
    ]
    rows = next((shape[0] for shape in found if shape is not None), None)
    lora = shapes.get(f"{embedding}.lora_embedding_A")
    return lora[1] if rows is None and lora is not None else rows


def merged_adapter(
    base: ModelReference,
    adapter: ModelPath,
    cache: Path,
    *,
    trust_remote_code: bool,
    dtype: torch.dtype | None,
) -> Path:
    """The folder with the model that an adapter makes of its base; merged if it is not there.

    Args:
        cache: the folder in which merged adapters are kept.
        dtype: the dtype to merge in; None for the base's own.

    Raises:
        ConfigError: there is no adapter.
        ArchitectureError: peft cannot merge the adapter into the base.
    """
    key = _digest(Path(base.local_path()), _files(adapter)[1].parent, str(dtype))
    name = f"{Path(base.model.path).name}_{Path(adapter.path).name}_{key}"
    folder, partial = cache / name, cache / f".{name}.partial"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):
        if folder.exists():
            return folder
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            LOG.info("merging the adapter %s into %s", adapter, base)
            _merge(base, adapter, partial, trust_remote_code=trust_remote_code, dtype=dtype)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _merge(
    base: ModelReference,
    adapter: ModelPath,
    folder: Path,
    *,
    trust_remote_code: bool,
    dtype: torch.dtype | None,
) -> None:
    """Have peft merge an adapter, and write the model with its tokenizer."""
    config = base.config(trust_remote_code)
    rows = adapter_rows(adapter, base, trust_remote_code)
    trusted = {"trust_remote_code": trust_remote_code}
    model = auto_class(config).from_pretrained(
        base.model.path, revision=base.model.revision, dtype=dtype or "auto", **trusted
    )
    if rows is not None and rows != config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        model = peft.PeftModel.from_pretrained(model, adapter.path, revision=adapter.revision)
        model.merge_and_unload().save_pretrained(folder)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ArchitectureError(
            f"{base}+{adapter}: peft cannot merge this adapter into this model "
            f"({first_line(error)}); check that it is the model that the adapter was trained on"
        ) from error
    with contextlib.suppress(DamError):  # a merge without text needs no tokenizer
        own = ModelReference(model=base.model, lora=adapter)
        load_tokenizer(own, trust_remote_code).save_pretrained(folder)


def _files(adapter: ModelPath) -> tuple[Path, Path]:
    """The configuration of an adapter and its weights."""
    config = find_file(adapter, _CONFIG)
    weights = next((file for name in _WEIGHTS if (file := find_file(adapter, name))), None)
    if config is None or weights is None:
        missing = _CONFIG if config is None else _WEIGHTS[0]
        raise ConfigError(
            f"{adapter}: required an adapter, since it stands behind a `+`, but it has no "
            f"{missing}; if the `+` is part of a folder's name, check that the folder exists"
        )
    return config, weights


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors by name."""
    if file.suffix == ".bin":
        loaded = checkpoint.pickled(file, "meta")
        return {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    with checkpoint.opened(file) as handle:
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118


def _digest(base: Path, adapter: Path, dtype: str) -> str:
    """A digest of what a merged adapter is made from.

    The files of the adapter count by content. Those of the base, which are large, count by name,
    size and time; in the Hub's cache, the name is a digest of the content.
    """
    digest = hashlib.sha256(dtype.encode())
    for file in model_files(adapter):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    for file in model_files(base):
        digest.update(f"{stamp(file)}\n".encode())
    return digest.hexdigest()[:16]
