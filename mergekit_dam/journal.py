"""What a merge under way keeps on the disk, so that the next run continues where this one ends.

Each part of a merge that is worth it has a state under a key: plain values, tensors and names of
files, in one safetensors file that is replaced as a whole. A part asks `get` whether there is one,
goes on from it, and tells with `put` how far it is. A state holds all that the rest depends on, so
that the result has the bytes of a merge that nothing has stopped.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_dam.digests import sha256_of_text
from mergekit_dam.stored import sync, tensors_header, written_whole

LOG = logging.getLogger(__name__)

SHARE = 0.02
"""Fraction of the time of a merge that may go into states that are not asked for at once."""

_PIECE = 1 << 26
"""Bytes of a tensor that are on their way to a file at a time."""

_TENSOR, _FILE = "__tensor__", "__file__"
_STATE, _DIGEST, _SAID = "state", "sha256", "said"


class Rows(Protocol):
    """A tensor, or hidden states in a file that are read where they are indexed."""

    @property
    def shape(self) -> torch.Size:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""

    def __getitem__(self, index: slice) -> Tensor:
        """Some of its rows."""


class Journal:
    """The states of a merge under way.

    Args:
        folder: folder of the states, and of the files that they name.
        keeps: whether there are states; if not, none is written and none is found.
        clock: tells the time in seconds.
    """

    def __init__(
        self, folder: Path, *, keeps: bool = True, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.folder, self.keeps = folder, keeps
        self._clock, self._began, self._writing = clock, clock(), 0.0
        self._synced: set[Path] = set()
        self._lost: list[Path] = []

    def get(self, key: str) -> Any:
        """The state under a key, its tensors mapped from their file; None if there is none."""
        file = self._file(key)
        if not self.keeps or not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                told = opened.metadata() or {}
                text = told.get(_STATE, "")
                if told.get(_DIGEST) != sha256_of_text(text):
                    raise ValueError("its digest is another")
                return self._decoded(json.loads(text), opened.get_tensor)
        except (SafetensorError, OSError, ValueError) as error:
            LOG.warning("%s cannot be read (%s): that part is made again", file, error)
            return None

    @property
    def said(self) -> str:
        """What the newest state says of how far the merge is; empty if there is none."""
        files = sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        for file in reversed(files):
            with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as opened:
                said = (opened.metadata() or {}).get(_SAID)
                if said:
                    return str(said)
        return ""

    def put(self, key: str, state: Any, *, said: str = "") -> None:
        """Replace the state under a key; files that it names are on the disk before.

        Args:
            state: plain values, tensors, hidden states and paths, in lists and in dictionaries
                whose keys are strings.
            said: how far the merge is with it, for people.
        """
        if not self.keeps:
            return
        began = self._clock()
        tensors: list[Rows] = []
        text = json.dumps(self._encoded(state, tensors))
        entries = [(str(n), own.dtype, tuple(own.shape)) for n, own in enumerate(tensors)]
        told = {_STATE: text, _DIGEST: sha256_of_text(text), _SAID: said}
        with written_whole(self._file(key)) as temporary, temporary.open("wb") as file:
            file.write(tensors_header(entries, told))
            for tensor in tensors:
                for piece in _pieces(tensor):
                    file.write(piece)
        self._writing += self._clock() - began
        lost, self._lost = self._lost, []
        for folder in lost:
            shutil.rmtree(folder, ignore_errors=True)

    def due(self) -> bool:
        """Whether states have taken less than `SHARE` of the time, so that another may be put."""
        return self.keeps and self._writing <= SHARE * (self._clock() - self._began)

    def drop(self, *keys: str) -> None:
        """Remove states that no further run asks for."""
        for key in keys:
            self._file(key).unlink(missing_ok=True)

    def remove(self, folder: Path) -> None:
        """Remove a folder as soon as no state names its files: after the next `put`."""
        if self.keeps:
            self._lost.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def room(self, name: str, *, lasting: bool = True) -> Iterator[Path]:
        """A folder for large files, which goes when the body is done.

        Args:
            name: name of the folder.
            lasting: whether it stays where the body ends early, for the next run.
        """
        folder = self.path(name)
        if not (self.keeps and lasting):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        done = False
        try:
            yield folder
            done = True
        finally:
            if done or not (self.keeps and lasting):
                shutil.rmtree(folder, ignore_errors=True)

    def path(self, name: str) -> Path:
        """The path of a folder for files that states name, or that a body makes."""
        return self.folder / f".dam-{name}"

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _encoded(self, value: Any, tensors: list[Rows]) -> Any:
        if isinstance(value, dict):
            return {key: self._encoded(own, tensors) for key, own in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._encoded(own, tensors) for own in value]
        if isinstance(value, Path):
            return {_FILE: self._named(value)}
        if hasattr(value, "dtype"):
            tensors.append(value)
            return {_TENSOR: [str(len(tensors) - 1), *_form(value)]}
        return value

    def _named(self, file: Path) -> str:
        """The name of a file in a state, relative to the folder; its bytes are on the disk."""
        if not file.is_relative_to(self.folder):
            return str(file)
        if file not in self._synced:
            sync(file)
            sync(file.parent)
            self._synced.add(file)
        return str(file.relative_to(self.folder))

    def _decoded(self, value: Any, tensor: Callable[[str], Tensor]) -> Any:
        if isinstance(value, list):
            return [self._decoded(own, tensor) for own in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {_TENSOR}:
            name, *form = value[_TENSOR]
            found = tensor(name)
            if _form(found) != form:
                raise ValueError(f"a tensor in it has the form {_form(found)}, not {form}")
            return found
        if value.keys() == {_FILE}:
            file = self.folder / value[_FILE]
            if not file.is_file():
                raise FileNotFoundError(f"{file} is gone")
            return file
        return {key: self._decoded(own, tensor) for key, own in value.items()}


def _form(tensor: Rows) -> list[Any]:
    """Dtype and shape of a tensor as plain values."""
    return [str(tensor.dtype), list(tensor.shape)]


def _pieces(tensor: Rows) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces, so that no copy of the whole is made."""
    if not tensor.shape:
        assert isinstance(tensor, Tensor)
        tensor = tensor.detach().reshape(1)
    rows = max(1, _PIECE // max(1, tensor.dtype.itemsize * tensor.shape[1:].numel()))
    for first in range(0, tensor.shape[0], rows):
        piece = tensor[first : first + rows].detach().cpu().contiguous()
        yield piece.reshape(-1).view(torch.uint8).numpy().data
