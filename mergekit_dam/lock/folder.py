"""Digests of the files and tensors of a merged model, read back from the disk."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME, REPORT_NAME
from mergekit_dam.digests import sha256_of, sha256_of_text
from mergekit_dam.errors import CheckpointError, first_line
from mergekit_dam.lock.schema import LOCK_NAME, Output, TensorDigest, canonical
from mergekit_dam.model import checkpoint
from mergekit_dam.stored import read_header
from mergekit_dam.untrusted import parsed_json

_THREADS = min(8, os.cpu_count() or 1)
_PIECE = 2**22
_OTHERS = (LOCK_NAME, REPORT_NAME)
_FOR_PEOPLE = (".md", ".html", ".svg", ".png")
TRACKED = "dam_tracking"
"""Name of the folder with what TensorBoard shows of a merge, which differs from run to run."""

THIS_RUN = "this_run"
"""Section of the report that differs from run to run."""

_READERS_OPEN = (".safetensors", ".bin", ".json", ".model", ".jinja", ".py")
"""Ends of the names of files that what loads a model may open."""


def output_of(folder: Path, names: Sequence[str], *, quiet: bool, intact: bool = True) -> Output:
    """Digests of files of a merged model, and of all its tensors.

    Args:
        folder: The folder.
        names: The files, except the lock and the report.
        quiet: Whether no progress is shown.
        intact: Whether all files have to be intact; if not, one that is damaged has no tensors.

    Raises:
        CheckpointError: A file with weights, or the report, is damaged or missing.
        OSError: A file cannot be read.
    """
    weights = [name for name in names if _holds_weights(name)]
    files = [folder / name for name in names]
    total = sum(file.stat().st_size for file in files)
    total += sum((folder / name).stat().st_size for name in weights)
    tensors: dict[str, TensorDigest] = {}
    with (
        tqdm(total=total, desc="sha256", unit="B", unit_scale=True, disable=quiet or None) as bar,
        ThreadPoolExecutor(_THREADS, "sha256") as pool,
    ):
        whole = {name: pool.submit(sha256_of, folder / name) for name in names}
        for name in weights:
            with nullcontext() if intact else suppress(CheckpointError):
                tensors |= dict(_tensors_of(folder / name, pool))
            bar.update((folder / name).stat().st_size)
        found = {}
        for name, future in whole.items():
            found[name] = future.result()
            bar.update((folder / name).stat().st_size)
    told = None
    with nullcontext() if intact else suppress(CheckpointError):
        told = _report_digest(folder / REPORT_NAME)
    return Output(files=found, report=told, tensors=tensors)


def files_in(folder: Path) -> list[str]:
    """Names of the files of a merged model that its lock lists.

    These are all but the lock itself, the report, whose values it lists, and what is for people:
    the model card, which they edit, pages and pictures of the report, and how the merge ran.
    """
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    shown = (name for name in found if not any(part.startswith(".") for part in name.parts))
    own = (name for name in shown if name.parts[0] != TRACKED)
    return sorted(
        n.as_posix() for n in own if str(n) not in _OTHERS and n.suffix not in _FOR_PEOPLE
    )


def read_by_others(name: str) -> bool:
    """Whether what loads a model may open a file by this name."""
    return "/" not in name and name.endswith(_READERS_OPEN)


def _report_digest(file: Path) -> str:
    """sha256 of the values of a report, without those that differ from run to run.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        values = parsed_json(file.read_bytes())
        return sha256_of_text(canonical({k: v for k, v in values.items() if k != THIS_RUN}))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file.name} cannot be read ({first_line(error)})") from error


def _holds_weights(name: str) -> bool:
    if name in (FILE_NAME, CORRECTIONS_NAME) or "/" in name:
        return False
    return name.endswith(".safetensors") or (
        name.startswith("pytorch_model") and name.endswith(".bin")
    )


def _tensors_of(file: Path, pool: ThreadPoolExecutor) -> Iterator[tuple[str, TensorDigest]]:
    if file.suffix == ".bin":
        yield from _pickled(file)
        return
    try:
        start, entries = read_header(file)
    except ValueError as error:
        raise CheckpointError(f"{file.name} is damaged ({first_line(error)})") from error
    yield from pool.map(partial(_of_entry, file, start), entries.items())


def _of_entry(file: Path, start: int, item: tuple[str, Any]) -> tuple[str, TensorDigest]:
    name, entry = item
    first, end = entry["data_offsets"]
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(start + first)
        left = end - first
        while left:
            piece = opened.read(min(left, _PIECE))
            if not piece:
                raise CheckpointError(f"{file.name} is cut off in {name}")
            digest.update(piece)
            left -= len(piece)
    own = TensorDigest(dtype=entry["dtype"], shape=entry["shape"], sha256=digest.hexdigest())
    return name, own


def _pickled(file: Path) -> Iterator[tuple[str, TensorDigest]]:
    loaded = checkpoint.pickled(file)
    for name, tensor in loaded.items():
        values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        yield (
            name,
            TensorDigest(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                sha256=hashlib.sha256(values.data).hexdigest(),
            ),
        )
