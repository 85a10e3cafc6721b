"""Writes the lock of a merge beside the merged model, when all its other files are there."""

import importlib.metadata
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import ModelPath
from mergekit.options import MergeOptions

from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.digests import sha256_of
from mergekit_dam.host import report
from mergekit_dam.host.identities import files_read, revision_of
from mergekit_dam.host.names import Names
from mergekit_dam.host.prepare import PreparedConfiguration
from mergekit_dam.lock.folder import files_in, output_of
from mergekit_dam.lock.schema import Lock, Origin, Source, Text
from mergekit_dam.streams import distributed

LOG = logging.getLogger(__name__)

OPTIONS = (
    "allow_crimes",
    "clone_tensors",
    "copy_tokenizer",
    "lora_merge_dtype",
    "out_shard_size",
    "random_seed",
    "safe_serialization",
    "trust_remote_code",
    "unsafe_truncate_embeddings",
    "write_model_card",
)
"""mergekit's options that change what is written; none holds a path or a secret."""

_COMPUTING = ("numpy", "tokenizers", "peft", "accelerate", "datasets", "huggingface_hub")


def write_lock(
    folder: Path, config: PreparedConfiguration, tree: Any, options: MergeOptions
) -> None:
    """Write `dam_lock.json`.

    Args:
        folder: folder of the merged model, which is complete.
        config: the configuration.
        tree: the same as it was written, as plain values.
        options: mergekit's options.
    """
    started = time.perf_counter()
    names = config.prepared.names
    told = json.loads((folder / REPORT_NAME).read_text("utf-8"))
    Lock(
        configuration=yaml.safe_dump(names.tree(tree), sort_keys=False, allow_unicode=True),
        options={name: value for name in OPTIONS if (value := getattr(options, name)) is not None},
        parameters=told.get("resolved_parameters", {}),
        sources=tuple(
            Source(
                name=names.of(model),
                model=_origin(model.model, names),
                adapter=None if model.lora is None else _origin(model.lora, names),
            )
            for model in config.referenced_models()
        ),
        calibration=_texts(told),
        replayed=told["replayed"],
        versions=_versions(),
        computed_on=_computed_on(options),
        output=output_of(folder, files_in(folder), quiet=True),
    ).write(folder)
    LOG.info("digests of the models and of the output: %.2f s", time.perf_counter() - started)


def _origin(path: ModelPath, names: Names) -> Origin:
    files = {name: sha256_of(file) for name, file in files_read(path).items()}
    name = names.text(str(path))
    if Path(path.path).exists():
        return Origin(name=name, files=files)
    return Origin(name=name, repository=path.path, revision=revision_of(path), files=files)


def _texts(told: dict[str, Any]) -> dict[str, Text]:
    """The texts of a report; a replay has read none, and knows their digests alone."""
    if told["replayed"]:
        return {name: Text(sha256=own) for name, own in told.get("calibration_sha256", {}).items()}
    return {name: _text(own) for name, own in told["calibration"].items()}


def _text(told: dict[str, Any]) -> Text:
    known = ("sha256", "source", "dataset", "revision", "kept")
    parts = tuple(_text(part) for part in told["parts"])
    return Text(**{name: told.get(name) for name in known}, parts=parts)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), **report.versions()}
    for package in _COMPUTING:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _computed_on(options: MergeOptions) -> dict[str, str | int]:
    device = torch.device(options.device or "cpu")
    name = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
    }
