"""One merge: which models dominate where, and how large its corrections are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Corrections
from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.shapes import sound_corrections
from mergekit_dam.inspection.layers import by_layer, elements


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a merge.

    Attributes:
        layer: Its name.
        tensors: Number of its tensors.
        means: Mean coefficient of each source; every tensor counts the same.
        dominates: Share of the columns in which the source has the largest coefficient.
        spread: Standard deviation of the coefficients about the means of their tensors.
        correction: Root mean square of the elements that corrections add; None without one.
    """

    layer: str
    tensors: int
    means: tuple[float, ...]
    dominates: tuple[float, ...]
    spread: float
    correction: float | None


@dataclass(frozen=True)
class Summary:
    """A merge.

    Attributes:
        path: The file of its coefficients, or its folder.
        sources: Names of the models, in the order of the coefficients; the base is one of them.
        layers: Its layers, in the order of the model.
        columns: Number of all coefficients of one source.
        correction_bytes: Size of the file of the corrections; 0 without one.
        metadata: Parameters, versions, revisions of models, digests of texts.
    """

    path: str
    sources: tuple[str, ...]
    layers: tuple[LayerSummary, ...]
    columns: int
    correction_bytes: int
    metadata: dict[str, Any]

    @property
    def means(self) -> tuple[float, ...]:
        """Mean coefficient of each source; every tensor counts the same."""
        return _averaged(self.layers, [own.means for own in self.layers])

    @property
    def dominates(self) -> tuple[float, ...]:
        """Share of the columns in which each source has the largest coefficient, by tensor."""
        return _averaged(self.layers, [own.dominates for own in self.layers])


def summarised(path: Path) -> Summary:
    """Read a merge's coefficients and corrections.

    Args:
        path: The file of the coefficients, or the folder of the merge.

    Raises:
        ConfigError: There is no such file, or it is damaged.
    """
    file = CoefficientFile.load(path, parameter=str(path))
    corrections = None if file.corrections is None else sound_corrections(file.corrections)
    layers = tuple(
        _layer(name, [file.coefficients[own] for own in names], _size(corrections, names))
        for name, names in by_layer(file.coefficients).items()
    )
    return Summary(
        path=str(path),
        sources=file.sources,
        layers=layers,
        columns=sum(tensor.shape[1] for tensor in file.coefficients.values()),
        correction_bytes=0 if file.corrections is None else file.corrections.stat().st_size,
        metadata=dict(file.metadata),
    )


def _layer(name: str, tensors: Sequence[Tensor], correction: float | None) -> LayerSummary:
    means = torch.stack([own.double().mean(1) for own in tensors]).mean(0)
    largest = torch.stack([_dominates(own) for own in tensors]).mean(0)
    variance = sum(own.double().var(1, correction=0).mean().item() for own in tensors)
    return LayerSummary(
        layer=name,
        tensors=len(tensors),
        means=tuple(means.tolist()),
        dominates=tuple(largest.tolist()),
        spread=math.sqrt(variance / len(tensors)),
        correction=correction,
    )


def _dominates(coefficients: Tensor) -> Tensor:
    """Share of the columns in which each source is largest; equal ones share a column."""
    largest = (coefficients == coefficients.max(0).values).double()
    return (largest / largest.sum(0)).mean(1)


def _size(corrections: Corrections | None, names: Sequence[str]) -> float | None:
    """Root mean square of the elements that corrections add to some tensors."""
    found = [] if corrections is None else [corrections.get(name) for name in names]
    known = [own for own in found if own is not None]
    if not known:
        return None
    return math.sqrt(sum(own.norm() ** 2 for own in known) / sum(map(elements, known)))


def _averaged(
    layers: Sequence[LayerSummary], rows: Sequence[tuple[float, ...]]
) -> tuple[float, ...]:
    count = sum(own.tensors for own in layers)
    columns = zip(*rows, strict=True)
    return tuple(
        sum(v * own.tensors for v, own in zip(column, layers, strict=True)) / count
        for column in columns
    )
