"""Whether a merge continues an earlier run of the same merge that was stopped.

Beside its states, the journal of a merge has a list of all that the result depends on. Where
anything of it is another now, the states are thrown away, and a line of the log says what it is.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.calibration.sets import tokens_sha256
from mergekit_dam.host.files import folder_of, header_of, model_files, stamp
from mergekit_dam.host.prepare import PreparedConfiguration
from mergekit_dam.host.report import versions
from mergekit_dam.journal import Journal
from mergekit_dam.parameters import UNRECORDED, RunParameters
from mergekit_dam.stored import written_whole
from mergekit_dam.streams import distributed
from mergekit_dam.untrusted import parsed_json

LOG = logging.getLogger(__name__)

FORMAT = 2
"""Number of the form of the states; a new one where older states cannot be read any more."""

_LIST = "depends_on.json"

_SAME_RESULT = {*UNRECORDED, "resident", "stream_offload", "gpu_memory"}
"""Parameters that the result does not depend on: they say where things are kept meanwhile."""

_OPTIONS = ("trust_remote_code", "lora_merge_dtype", "unsafe_truncate_embeddings", "lazy_unpickle")
"""Options of mergekit that change what is read."""


def open_journal(
    folder: Path, config: PreparedConfiguration, options: MergeOptions
) -> Journal | None:
    """The journal of a merge, with the states of an earlier run if it was of the same merge.

    Args:
        folder: folder of the states; it need not exist.
        config: the checked configuration; its models are on this machine.
        options: mergekit's options.

    Returns:
        None if nothing is kept: without a fit, with `resume: false`, or with several processes.
    """
    prepared = config.prepared
    before, now = _before(folder), dict[str, str]()
    reason = "the configuration has nothing to fit any more"
    if prepared.calibration:
        reason = "`resume` is false"
        if prepared.run.resume:
            now = depends_on(config, options)
            reason = _changed(before or {}, now)
    if before is not None and reason:
        LOG.warning("not continued: %s", reason)
    if reason:
        shutil.rmtree(folder, ignore_errors=True)
    if not now:
        return None
    if distributed.size() > 1:
        LOG.info("nothing is kept for a next run, since several processes make this merge")
        return None
    journal = Journal(folder)
    if before is not None and not reason:
        LOG.warning("continuing: %s before", journal.said)
    with written_whole(folder / _LIST) as temporary:
        temporary.write_text(json.dumps(now, indent=1), encoding="utf-8")
    return journal


def _before(folder: Path) -> dict[str, str] | None:
    """What the states of an earlier run depend on; None if there are none."""
    if not any(folder.glob("*.safetensors")):
        return None
    try:
        found = parsed_json((folder / _LIST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What changed, for a message; empty if nothing did."""
    names = (*now, *before)
    changed = next((name for name in names if before.get(name) != now.get(name)), None)
    return "" if changed is None else f"{changed} changed"


def depends_on(config: PreparedConfiguration, options: MergeOptions) -> dict[str, str]:
    """All that the result of a merge depends on, by names for people.

    Model files count by name, size, time and header: they are too large to be read.

    Args:
        config: the checked configuration; its models are on this machine.
        options: mergekit's options.
    """
    prepared = config.prepared
    found: dict[str, Any] = {"the form of what is kept": FORMAT}
    found |= {f"the version of {package}": own for package, own in versions().items()}
    found["the device"] = _kind(torch.device(options.device or "cpu"))
    found["the number of processes"] = distributed.size()
    own = prepared.run.model_dump(mode="json", exclude=_SAME_RESULT)
    found |= {f"`{name}`": value for name, value in own.items()}
    # As Python prints it: mergekit cannot write a model whose name has a space as JSON.
    rest = {name: getattr(config, name) for name in MergeConfiguration.model_fields}
    rest["parameters"] = {
        name: own
        for name, own in (config.parameters or {}).items()
        if name not in RunParameters.model_fields
    }
    found["the configuration"] = _digest(repr(rest))
    found |= {f"--{name.replace('_', '-')}": getattr(options, name) for name in _OPTIONS}
    for model in config.referenced_models():
        parts = [part for part in (model.model, model.lora) if part is not None]
        read = "\n".join(_files_of(part, options.transformers_cache) for part in parts)
        found[f"the files of {model}"] = _digest(read)
    start = prepared.start
    for file in () if start is None else (Path(prepared.run.start), start.corrections):
        if file is not None:
            found[f"the file {file.name}, to start from,"] = stamp(file)
    for model, calibration in prepared.calibration.items():
        digest = tokens_sha256(calibration.tokens, calibration.counted)
        found[f"the calibration of {model}"] = digest
    return {name: str(value) for name, value in found.items()}


def _files_of(path: ModelPath, cache: str | None) -> str:
    """What can be told of a model's files without reading them."""
    folder = folder_of(path, cache)
    files = [] if folder is None else model_files(folder)
    return "\n".join(f"{stamp(file)} {_digest(header_of(file))}" for file in files)


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
