"""Where every planned tensor acts in the decoder."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit.graph import Task

from mergekit_dam.coefficients.tensors import TensorSpec
from mergekit_dam.host.headers import WeightTask
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.probe import input_or_output
from mergekit_dam.sources.stage import StageKind


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and the place where it acts.

    Attributes:
        kind: "outside" of the decoder, or the kind of its stage.
        index: index of the block; 0 for other kinds.
        spec: how the tensor is fitted.
        gather: mergekit's task that gathers the tensor from all sources.
    """

    kind: StageKind | Literal["outside"]
    index: int
    spec: TensorSpec
    gather: Task[Any]


def place_tensors(
    planned: Sequence[WeightTask], specs: Sequence[TensorSpec], decoder: Decoder
) -> list[PlacedTensor]:
    """Find the place of every planned tensor in the decoder."""
    found = [decoder.names.in_model(spec.name) for spec in specs]
    specs = [
        dataclasses.replace(spec, renamed=name) if name not in (None, spec.name) else spec
        for spec, name in zip(specs, found, strict=True)
    ]
    names = {name: spec.name for spec, name in zip(specs, found, strict=True) if name is not None}
    parts = input_or_output(
        decoder, frozenset(n for n in names if decoder.names.block_of(n) is None)
    )
    placed = []
    for (_, task), spec, name in zip(planned, specs, found, strict=True):
        gather = task.gather_tensors
        canonical = None if name is None else decoder.names.canonical(name)
        if name is None or canonical is None:
            placed.append(PlacedTensor("outside", 0, spec, gather))
        elif canonical != name and canonical in names:
            tied = dataclasses.replace(spec, tied_to=names[canonical])
            placed.append(PlacedTensor("output", 0, tied, gather))
        elif (block := decoder.names.block_of(name)) is not None:
            placed.append(PlacedTensor("block", block, spec, gather))
        else:
            placed.append(PlacedTensor(parts.get(name, "outside"), 0, spec, gather))
    return placed
