"""The factors of corrections, as unknowns of a descent beside the coefficients.

A corrected linear's weight is `sum_s c_s * W_s + D + left @ right`, with D the correction of a
layer fit. At the start of a first descent `left` is 0, and the rows of `right` are random and
orthonormal; a further descent goes on from where the factors are.

Factors, their gradients and the optimiser's moments are in files that are mapped into memory, as
they are many times as large as the coefficients.
"""

import dataclasses
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW

from mergekit_dam.coefficients.correction import Correction, Corrections
from mergekit_dam.journal import Journal
from mergekit_dam.search.coordinates import Coordinate
from mergekit_dam.streams.distributed import all_sum, from_first

_STATE = ("exp_avg", "exp_avg_sq")
"""Moments that AdamW keeps per parameter."""


class Factors(Corrections):
    """Corrections of which factors move: those of a point on its way through a descent.

    Args:
        coordinates: The fitted tensors; those of a rank above 0 have factors.
        start: Corrections of the start, if it has any.
        folder: Folder for the files of this descent.
        seed: Seed of random factors.
    """

    def __init__(
        self,
        coordinates: Iterable[Coordinate],
        start: Corrections | None,
        *,
        folder: Path,
        seed: int,
    ) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._start = start
        self._moving: dict[str, list[Tensor]] = {}
        self._moments: dict[Tensor, dict[str, Tensor]] = {}
        for number, coordinate in enumerate(c for c in coordinates if c.rank):
            self._put(coordinate, folder / f"{number:06d}", seed)

    def _put(self, coordinate: Coordinate, file: Path, seed: int) -> None:
        """Map the files of one tensor, and fill in its start."""
        name = coordinate.name
        known = None if self._start is None else self._start.get(name)
        # Factorisations may differ between machines, the start of all processes must not.
        given = from_first(lambda: starting_factors(coordinate, known, seed))
        self._moving[name] = pair = []
        for side, value in zip(("left", "right"), given, strict=True):
            factor, gradient, *moments = mapped(file.with_suffix(f".{side}"), value.shape, 4)
            factor.copy_(value)
            factor.grad = gradient
            self._moments[factor] = dict(zip(_STATE, moments, strict=True))
            pair.append(factor)

    def __bool__(self) -> bool:
        return bool(self._moving) or bool(self._start)

    @property
    def move(self) -> bool:
        """Whether any tensor has factors."""
        return bool(self._moving)

    def get(self, name: str) -> Correction | None:
        """The correction of an output tensor at this point, if it has one."""
        whole = None if self._start is None else self._start.get(name)
        moving = self.moving(name)
        if not moving:
            return whole
        left, right = moving
        return dataclasses.replace(whole or Correction(), moved_left=left, moved_right=right)

    def moving(self, name: str) -> list[Tensor]:
        """The factors of a tensor that move, on the host and with gradients; none if it has none.

        They are fp32 `[out, rank]` and `[rank, in]` (of every expert).
        """
        return self._moving.get(name, [])

    def optimizer(self, rate: float) -> AdamW:
        """AdamW on all factors, without weight decay, its moments in files."""
        factors = self.all
        optimizer = AdamW(factors, lr=rate, weight_decay=0.0, fused=True)
        for factor in factors:
            optimizer.state[factor] = {"step": torch.tensor(0.0), **self._moments[factor]}
        return optimizer

    def add_gradient(self, name: str, gradient: Tensor, share: float) -> None:
        """Add to the gradients of a tensor's factors, if it has some.

        Args:
            name: Name of the output tensor.
            gradient: Gradient of its merged weight, fp32 `[out, in]` (of every expert).
            share: Factor of the gradient.
        """
        moving = self.moving(name)
        if not moving:
            return
        left, right = (factor.to(gradient) for factor in moving)
        found = (gradient @ right.mT, left.mT @ gradient)
        for factor, added in zip(moving, found, strict=True):
            assert factor.grad is not None
            factor.grad.add_(added.to(factor), alpha=share)

    def add_up(self) -> None:
        """Add the gradients of the other processes."""
        for factor in self.all:
            assert factor.grad is not None
            factor.grad.copy_(all_sum(factor.grad))

    @property
    def all(self) -> list[Tensor]:
        """All factors that move: left and right ones of one tensor after the other."""
        return [factor for pair in self._moving.values() for factor in pair]

    def kept(self, names: Iterable[str], folder: Path, journal: Journal) -> Corrections:
        """All corrections as they are now, in files of their own.

        Args:
            names: Names of all output tensors.
            folder: Folder for the files.
            journal: Removes it when the corrections are discarded.
        """
        found = Corrections(folder, remove=journal.remove)
        for name in names:
            correction = self.get(name)
            if correction is not None:
                found.put(name, correction)
        return found


def starting_factors(
    coordinate: Coordinate, known: Correction | None, seed: int
) -> tuple[Tensor, Tensor]:
    """The factors fp32 `[out, rank]` and `[rank, in]` (of every expert) that a descent starts from.

    Where no descent has moved them before, their product is 0. Rows of one length suit one learning
    rate for all tensors.
    """
    if known is not None and known.moved_left is not None and known.moved_right is not None:
        return known.moved_left, known.moved_right
    *experts, out, columns = coordinate.shape
    # Every tensor has random numbers of its own, whatever other tensors there are.
    own = zlib.crc32(f"{seed} {coordinate.name}".encode())
    generator = torch.Generator().manual_seed(own)
    random = torch.randn(*experts, columns, coordinate.rank, generator=generator)
    rows = torch.linalg.qr(random).Q.mT.contiguous()
    return torch.zeros(*experts, out, coordinate.rank), rows


def mapped(file: Path, shape: torch.Size, count: int) -> Sequence[Tensor]:
    """Some fp32 tensors of zeros, of one shape, in a new file that is mapped into memory."""
    size = count * shape.numel()
    with file.open("wb") as handle:
        handle.truncate(4 * size)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash later
            os.posix_fallocate(handle.fileno(), 0, 4 * size)
    whole = torch.from_file(str(file), shared=True, size=size, dtype=torch.float32)
    return whole.view(count, *shape).unbind()
