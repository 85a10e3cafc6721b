"""Corrections: matrices that are added to merged weights, and the file that keeps them.

A corrected weight is `sum_s c_s * W_s + D`. D is kept whole, as two factors of low rank, or as the
sum of both.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.choices import CorrectionKind
from mergekit_dam.coefficients.file import CORRECTIONS_NAME, METADATA_KEY
from mergekit_dam.errors import DamError
from mergekit_dam.stored import tensors_header, written_whole

FIELDS = ("full", "left", "right", "moved_left", "moved_right")
"""Tensors of a correction, as they are called in files."""

_PIECE = 2**18
"""Elements of a weight that factors are multiplied for at a time on a CPU: they stay in its cache.
On a GPU it is the whole weight, as every piece would start a kernel of its own per rank."""


@dataclass(frozen=True)
class Correction:
    """A matrix that is added to one merged weight, seen as `[out, in]`.

    It is `full + left @ right + moved_left @ moved_right`; what is None is left out. For fused
    experts all tensors have a first dimension more.

    Attributes:
        full: fp32 `[out, in]`, the correction of a layer fit.
        left, right: fp32 `[out, rank]` and `[rank, in]`, its factors if it is of low rank.
        moved_left, moved_right: The same of factors that a descent has added.
    """

    full: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    moved_left: Tensor | None = None
    moved_right: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field."""
        found = {name: getattr(self, name) for name in FIELDS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Left and right factors."""
        pairs = ((self.left, self.right), (self.moved_left, self.moved_right))
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def add_to(self, merged: Tensor, *, axis: int = -1, as_written: bool = True) -> None:
        """Add to a merged weight, in place.

        In what is written, products of the factors are added up rank by rank, each rounded to fp32:
        a product of matrices is summed in another order on another machine. It is many times as
        fast, and does for a model that only runs.

        Args:
            merged: fp32 weight of the merged model.
            axis: Input dimension of the weight.
            as_written: Add rank by rank; the result is the same on all machines.
        """
        turned = out_by_in(merged, axis)
        if turned.ndim == 3:
            for expert, own in enumerate(turned):
                self.of_expert(expert).add_to(own, as_written=as_written)
            return
        if self.full is not None:
            turned.add_(self.full.to(merged))
        for left, right in self.pairs:
            columns, right = left.to(merged), right.to(merged)
            if not as_written:
                turned.addmm_(columns, right)
                continue
            rows = len(turned) if merged.is_cuda else max(1, _PIECE // turned.shape[1])
            for first in range(0, len(turned), rows):
                piece = turned[first : first + rows]
                for column, row in zip(columns[first : first + rows].T, right, strict=True):
                    piece.addcmul_(column[:, None], row[None])

    def norm(self) -> float:
        """Its Frobenius norm, from the factors alone: their product is not formed."""
        norm, left, right = 0.0, None, None
        if self.pairs:
            left = torch.cat([pair[0].double() for pair in self.pairs], dim=-1)
            right = torch.cat([pair[1].double() for pair in self.pairs], dim=-2)
            norm += float(((left.mT @ left) * (right @ right.mT)).sum())
        if self.full is not None:
            norm += float(torch.linalg.vector_norm(self.full, dtype=torch.float64)) ** 2
            if left is not None and right is not None:
                norm += 2 * float(((left.mT @ self.full.double()) * right).sum())
        return math.sqrt(max(norm, 0.0))

    def of_expert(self, expert: int) -> "Correction":
        """The correction of one expert's slice of a fused weight."""
        return Correction(**{name: tensor[expert] for name, tensor in self.tensors.items()})

    def cpu(self) -> "Correction":
        """The same on the host."""
        return Correction(**{name: tensor.cpu() for name, tensor in self.tensors.items()})

    @classmethod
    def stacked(cls, own: Iterable["Correction | None"]) -> "Correction | None":
        """The correction of a fused weight, from those of its experts; None if none has one."""
        every = list(own)
        like = next((correction for correction in every if correction is not None), None)
        if like is None:
            return None
        stacks = {
            name: torch.stack(
                [torch.zeros_like(tensor) if c is None else c.tensors[name] for c in every]
            )
            for name, tensor in like.tensors.items()
        }
        return cls(**stacks)


def out_by_in(weight: Tensor, axis: int) -> Tensor:
    """A weight as `[out, in]`, of every expert if it is fused, given its input dimension."""
    return weight if axis % weight.ndim == weight.ndim - 1 else weight.mT


def saves_room(shape: Sequence[int], rank: int) -> bool:
    """Whether factors of some rank are smaller than a matrix `[out, in]`."""
    out, columns = shape
    return min(rank, out, columns) * (out + columns) < out * columns


def stored_bytes(
    shape: Sequence[int],
    kind: CorrectionKind,
    rank: int,
    *,
    swept: bool = True,
    descended: bool = False,
) -> int:
    """Bytes of the correction of a weight in its file, at the most.

    Args:
        shape: Shape of the weight; fused experts come first.
        rank: Rank of factors.
        swept: Whether layer fits correct it, in the way that `kind` says.
        descended: Whether a descent adds factors.
    """
    if kind == "none" or len(shape) < 2:
        return 0
    *experts, out, columns = shape
    factors = min(rank, out, columns) * (out + columns)
    whole = kind == "full" or not saves_room((out, columns), rank)
    own = out * columns if whole else factors
    return 4 * math.prod(experts) * (swept * own + descended * factors)


class Corrections:
    """Corrections by output tensor's name, in files: only the one that is asked for is in memory.

    Args:
        folder: Folder for one file per correction; it is made when the first is put there.
        remove: Removes that folder when the corrections are discarded; at once by default.
        state: What `state` said of corrections that are there already.

    Attributes:
        norms: Output tensor's name -> Frobenius norm of its correction, where it was put here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        remove: Callable[[Path], None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._remove = remove or partial(shutil.rmtree, ignore_errors=True)
        self._files: dict[str, Path] = dict(state["files"]) if state else {}
        self.norms: dict[str, float] = dict(state["norms"]) if state else {}

    @classmethod
    def of_file(cls, path: Path) -> "Corrections":
        """The corrections that an earlier merge has written.

        Raises:
            SafetensorError: The file is damaged.
        """
        found = cls(path.parent)
        with safe_open(path, framework="pt") as handle:
            names = {key.rpartition(".")[0] for key in handle.keys()}  # noqa: SIM118 (no mapping)
        found._files = dict.fromkeys(sorted(names), path)
        return found

    @classmethod
    def of_state(
        cls, state: Mapping[str, Any] | None, remove: Callable[[Path], None]
    ) -> "Corrections | None":
        """Corrections that were put into one folder before, or saved; None for None.

        Args:
            state: What `state` said of them.
            remove: Removes their folder when they are discarded.
        """
        if state is None:
            return None
        folder = next((file.parent for file in state["files"].values()), Path())
        return cls(folder, remove=remove, state=state)

    def __bool__(self) -> bool:
        return bool(self._files)

    def put(self, name: str, correction: Correction) -> None:
        """Keep the correction of an output tensor."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{len(self._files):06d}.safetensors"
        own = {f"{name}.{key}": tensor for key, tensor in correction.cpu().tensors.items()}
        save_file({key: tensor.contiguous() for key, tensor in own.items()}, file)
        self._files[name] = file
        self.norms[name] = correction.norm()

    def get(self, name: str) -> Correction | None:
        """The correction of an output tensor, if it has one.

        Raises:
            DamError: If it is not finite.
        """
        file = self._files.get(name)
        if file is None:
            return None
        with safe_open(file, framework="pt") as handle:
            keys = handle.keys()
            found = {key: f"{name}.{key}" for key in FIELDS if f"{name}.{key}" in keys}
            tensors = {key: handle.get_tensor(own) for key, own in found.items()}
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise DamError(
                    f"{name}: its correction (`{key}` in {file}) is not finite; name the files of "
                    f"an intact merge"
                )
        return Correction(**tensors)

    def _all(self) -> Iterator[tuple[str, Correction]]:
        """Every output tensor's name and its correction, one at a time."""
        for name in sorted(self._files):
            correction = self.get(name)
            assert correction is not None
            yield name, correction

    def save(self, path: Path) -> str:
        """Write all of them to one safetensors file, one by one, and read from it later.

        Returns:
            Digest of all tensors, which is in the metadata of the file, too.
        """
        # The digest is known when all tensors are written: until then, zeros keep its place.
        entries = (
            (f"{name}.{key}", tensor.dtype, tensor.shape)
            for name, correction in self._all()
            for key, tensor in correction.tensors.items()
        )
        header = tensors_header(entries, {METADATA_KEY: "0" * 64})
        digest = hashlib.sha256()
        with written_whole(path) as temporary, temporary.open("wb") as file:
            file.write(header)
            for _, correction in self._all():
                for tensor in correction.tensors.values():
                    values = tensor.numpy().tobytes()
                    digest.update(values)
                    file.write(values)
            file.seek(header.index(b"0" * 64))
            file.write(digest.hexdigest().encode())
        self.discard()
        self._files = dict.fromkeys(sorted(self._files), path)
        return digest.hexdigest()

    @property
    def state(self) -> dict[str, Any]:
        """All of it for the journal: files and norms by the output tensor's name."""
        return {"files": dict(self._files), "norms": dict(self.norms)}

    def discard(self) -> None:
        """Remove the files that were put into the folder."""
        for file in set(self._files.values()):
            if file.parent == self._folder and file.name != CORRECTIONS_NAME:
                self._remove(self._folder)
                return
