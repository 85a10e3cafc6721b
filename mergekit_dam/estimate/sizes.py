"""The sizes of one output tensor, and of one part of the model."""

from dataclasses import dataclass

import torch

from mergekit_dam.choices import CorrectionKind, ExpertFeed
from mergekit_dam.estimate.structure import Group, UnitShape
from mergekit_dam.sources.stage import StageKind


@dataclass(frozen=True)
class TensorSize:
    """Sizes of one output tensor.

    Attributes:
        parameters: number of elements of the merged tensor.
        stored: bytes in the files of all sources.
        loaded: bytes in memory once the tensors of all sources are loaded.
        converted: those of the loaded bytes that are copies, not pages of a mapped file: tensors
            that are converted to another dtype, dequantised or brought into one vocabulary.
        written: bytes of the merged tensor as it is written.
        matrix: it has two dimensions.
        loads: dtypes in which sources load it.
        writes: dtype in which it is written.
        correction: bytes of its correction.
        factors: bytes of those factors of the correction that a descent moves.
        rank: rank of these factors.
    """

    name: str
    parameters: int
    stored: int
    loaded: int
    converted: int
    written: int
    matrix: bool
    loads: frozenset[torch.dtype]
    writes: torch.dtype
    correction: int = 0
    factors: int = 0
    rank: int = 0

    @property
    def half(self) -> bool:
        """Whether the tensor of some source is not fp32, so that running in fp32 takes a copy."""
        return self.loads != {torch.float32}


@dataclass(frozen=True)
class PartSize:
    """Sizes of one part of the model: the input, a block, or the output.

    Attributes:
        tensors: tensors of the part, including those that the output borrows from the input.
        groups: units of the part, grouped as they are fitted, in the order the data passes them.
        unknowns: unknowns per column of a linear.
        fits_head: the part has an output head of its own, which is fitted.
        by_column: every column of a linear has unknowns of its own.
        experts: the tokens that experts are fitted to.
        correction: the largest kind of correction that a linear gets.
        correction_rank: the highest rank of those of low rank.
    """

    kind: StageKind
    tensors: tuple[TensorSize, ...]
    groups: tuple[Group, ...]
    unknowns: int
    fits_head: bool = False
    by_column: bool = True
    experts: ExpertFeed = "routed"
    correction: CorrectionKind = "none"
    correction_rank: int = 0

    @property
    def parameters(self) -> int:
        """Number of elements of the merged part."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def units(self) -> tuple[UnitShape, ...]:
        """All units, in call order."""
        return tuple(unit for group in self.groups for unit in group)

    def of(self, *kinds: str) -> tuple[UnitShape, ...]:
        """The units of some kinds."""
        return tuple(unit for unit in self.units if unit.kind in kinds)
