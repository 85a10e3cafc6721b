"""Where every planned tensor acts in the decoder, and the decoders of all sources."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit.graph import Task

from mergekit_dam.coefficients.tensors import TensorPlan
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.sources.headers import Planned
from mergekit_dam.sources.stage import StageKind


@dataclass(frozen=True)
class Place:
    """Where one tensor acts.

    Attributes:
        kind: "outside" of the decoder, or the kind of its stage.
        index: of the block.
        plan: of the tensor.
        gather: mergekit's task that brings the tensors of all sources.
    """

    kind: StageKind | Literal["outside"]
    index: int
    plan: TensorPlan
    gather: Task[Any]


def place_tensors(
    planned: Sequence[Planned], plans: Sequence[TensorPlan], decoder: Decoder
) -> list[Place]:
    """Where every planned tensor acts in the decoder."""
    found = [decoder.in_model(plan.name) for plan in plans]
    plans = [
        dataclasses.replace(plan, renamed=name) if name not in (None, plan.name) else plan
        for plan, name in zip(plans, found, strict=True)
    ]
    names = {name: plan.name for plan, name in zip(plans, found, strict=True) if name is not None}
    parts = decoder.part_of(frozenset(n for n in names if decoder.block_of(n) is None))
    places = []
    for (_, task), plan, name in zip(planned, plans, found, strict=True):
        gather = task.gather_tensors
        canonical = None if name is None else decoder.canonical(name)
        if name is None or canonical is None:
            places.append(Place("outside", 0, plan, gather))
        elif canonical != name and canonical in names:
            tied = dataclasses.replace(plan, tied_to=names[canonical])
            places.append(Place("output", 0, tied, gather))
        elif (block := decoder.block_of(name)) is not None:
            places.append(Place("block", block, plan, gather))
        else:
            places.append(Place(parts.get(name, "outside"), 0, plan, gather))
    return places
