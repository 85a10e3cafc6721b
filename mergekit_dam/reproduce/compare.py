"""What differs between what a lock lists and what there is."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.host.compat import LazyTensorLoader
from mergekit_dam.host.files import holds_weights, stored_index
from mergekit_dam.lock.schema import Output

_PIECE = 2**22
"""Elements that are compared at a time."""


@dataclass(frozen=True)
class Difference:
    """One file or tensor that is not as it was.

    Attributes:
        what: "file" or "tensor".
        name: Its name.
        how: What differs, in words.
        largest: Largest absolute difference of two elements, where both tensors are there.
        relative: Norm of the difference, relative to that of the tensor of the lock.
    """

    what: str
    name: str
    how: str
    largest: float | None = None
    relative: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        text = f"{self.what} {self.name}: {self.how}"
        if self.largest is not None:
            text += f", by at most {self.largest:.3g}, relative norm {self.relative:.3g}"
        return text


def differences(
    locked: Output, found: Output, *, files: Collection[str] | None = None
) -> list[Difference]:
    """What differs between two outputs: tensors first, then files.

    Args:
        locked: What a lock lists.
        found: What there is.
        files: Names of the files that count; None for all of them.
    """
    return [
        *_compared("tensor", locked.tensors, found.tensors),
        *_compared("file", _only(locked.files, files), _only(found.files, files)),
    ]


def measured(difference: Difference, locked: Path, found: Path) -> Difference:
    """A difference of tensors with its size, where both models are there.

    Args:
        difference: Any difference.
        locked: Folder of the model of the lock.
        found: Folder of the other model.
    """
    if difference.what != "tensor" or not difference.how.startswith("other values"):
        return difference
    first, second = (_tensor(folder, difference.name) for folder in (locked, found))
    if first is None or second is None or first.shape != second.shape:
        return difference
    largest = squares = norm = 0.0
    pieces = (torch.split(tensor.reshape(-1), _PIECE) for tensor in (first, second))
    for a, b in zip(*pieces, strict=True):
        apart = a.double() - b.double()
        largest = max(largest, float(apart.abs().max()))
        squares += float(apart.square().sum())
        norm += float(a.double().square().sum())
    relative = (squares / norm) ** 0.5 if norm else float("inf")
    return Difference("tensor", difference.name, difference.how, largest, relative)


def _only(files: Mapping[str, str], names: Collection[str] | None) -> Mapping[str, str]:
    return {name: own for name, own in files.items() if names is None or name in names}


def _compared(what: str, locked: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(what, name, _how(locked.get(name), found.get(name)))
        for name in sorted({*locked, *found})
        if locked.get(name) != found.get(name)
    ]


def _how(locked: Any, found: Any) -> str:
    if locked is None:
        return "not in the lock"
    if found is None:
        return "missing"
    if isinstance(locked, str):
        return f"other content (sha256 {found[:12]}, in the lock {locked[:12]})"
    if (locked.dtype, locked.shape) != (found.dtype, found.shape):
        return f"{found.dtype} {list(found.shape)}, in the lock {locked.dtype} {list(locked.shape)}"
    return f"other values (sha256 {found.sha256[:12]}, in the lock {locked.sha256[:12]})"


@torch.no_grad()
def _tensor(folder: Path, name: str) -> Tensor | None:
    if not holds_weights(folder):
        return None
    loader = LazyTensorLoader(stored_index(folder), lazy_unpickle=False)
    tensor: Tensor | None = loader.get_tensor(name, raise_on_missing=False)
    return tensor
