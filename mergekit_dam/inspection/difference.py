"""Two merges: what differs in their parameters, models and texts, and where coefficients do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.inspection.layers import by_layer

_TOLD = ("parameters", "revisions", "versions", "calibration_sha256")
"""What of a merge's origin is compared."""


_OF_MODELS = ("revisions", "calibration_sha256")
"""What of it has an entry per model."""


@dataclass(frozen=True)
class LayerDifference:
    """How far the coefficients of a layer are from those of another merge.

    Attributes:
        layer: Its name.
        rms: Root mean square of the differences.
        largest: The largest of them.
        tensor: Where that is.
    """

    layer: str
    rms: float
    largest: float
    tensor: str


@dataclass(frozen=True)
class Difference:
    """Two merges.

    Attributes:
        paths: The two files or folders.
        sources: Names of the models of each.
        origin: What differs: the dotted name of an entry, and its two values.
        layers: Layers in which coefficients differ, the largest difference first.
        equal: Number of layers in which none do.
        only: Tensors that one of the two has alone.
        unlike: Tensors with another number of coefficients in each, which are not compared.
        corrections: Whether each has corrections.
    """

    paths: tuple[str, str]
    sources: tuple[tuple[str, ...], tuple[str, ...]]
    origin: tuple[tuple[str, Any, Any], ...]
    layers: tuple[LayerDifference, ...]
    equal: int
    only: tuple[tuple[str, ...], tuple[str, ...]]
    unlike: tuple[str, ...]
    corrections: tuple[bool, bool]

    @property
    def same(self) -> bool:
        """Whether both have equal coefficients of the same tensors, and the same corrections."""
        digests = [entry for entry in self.origin if entry[0] == "corrections"]
        return not (self.layers or any(self.only) or self.unlike or digests)


def compared(first: Path, second: Path) -> Difference:
    """Compare two merges.

    Models are matched by their weights and names; where both differ, by their order.

    Args:
        first, second: Files of coefficients, or folders of merges.

    Raises:
        ConfigError: A file is missing or damaged, or the merges have another number of models.
    """
    one, other = (CoefficientFile.load(path, parameter=str(path)) for path in (first, second))
    rows = other.rows_of(one.identities, changed="allow")
    shared = sorted(one.coefficients.keys() & other.coefficients.keys())
    unlike = [n for n in shared if not _comparable(one, other, n)]
    layers = []
    for layer, names in by_layer(set(shared) - set(unlike)).items():
        layers.append(_layer(layer, {n: _gap(one, other, n, rows) for n in names}))
    different = [own for own in layers if own.largest > 0]
    return Difference(
        paths=(str(first), str(second)),
        sources=(one.sources, other.sources),
        origin=tuple(_origin(one.metadata, other.metadata)),
        layers=tuple(sorted(different, key=lambda own: -own.rms)),
        equal=len(layers) - len(different),
        only=(
            tuple(sorted(one.coefficients.keys() - other.coefficients.keys())),
            tuple(sorted(other.coefficients.keys() - one.coefficients.keys())),
        ),
        unlike=tuple(unlike),
        corrections=(one.corrections is not None, other.corrections is not None),
    )


def _comparable(one: CoefficientFile, other: CoefficientFile, name: str) -> bool:
    """Whether columns correspond; one coefficient per tensor stands for all columns."""
    sizes = {own.coefficients[name].shape[1] for own in (one, other)}
    return len(sizes - {1}) <= 1


def _gap(
    one: CoefficientFile, other: CoefficientFile, name: str, rows: Sequence[int]
) -> tuple[float, int, float]:
    """Sum of squares, number, and largest of the differences of one tensor."""
    gap = one.coefficients[name].double() - other.coefficients[name].double()[rows]
    return float((gap * gap).sum()), gap.numel(), float(gap.abs().max())


def _layer(layer: str, gaps: Mapping[str, tuple[float, int, float]]) -> LayerDifference:
    squares, counts, _ = (sum(column) for column in zip(*gaps.values(), strict=True))
    tensor = max(gaps, key=lambda name: gaps[name][2])
    return LayerDifference(layer, math.sqrt(squares / counts), gaps[tensor][2], tensor)


def _origin(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Entries of the metadata that differ; None where one does not have them."""
    found = []
    for key in _TOLD:
        first, second = one.get(key) or {}, other.get(key) or {}
        names = dict.fromkeys((*first, *second))
        if key in _OF_MODELS:  # of other models, nothing is compared
            names = {name: None for name in names if name in first and name in second}
        for name in names:
            if first.get(name) != second.get(name):
                found.append((f"{key}.{name}", first.get(name), second.get(name)))
    if one.get("corrections") != other.get("corrections"):
        found.append(("corrections", one.get("corrections"), other.get("corrections")))
    return found
