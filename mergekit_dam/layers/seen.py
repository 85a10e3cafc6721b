"""Inputs and outputs of the teachers' parts and the merged part that a group's fit needs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.layers.state import Walk
from mergekit_dam.model.hooks import Captured
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.share import Split
from mergekit_dam.streams.stream import Stream


@dataclass(frozen=True)
class Seen:
    """Recorded inputs and outputs of the teacher's part and the merged part for one chunk.

    Attributes:
        source: index of the teacher.
        drift: residual stream of the teacher minus that of the merged model, at the point where
            the units of the group add to it.
        numbers: numbers of the sequences among those of all processes.
        counted: which tokens judge, bool `[tokens]`; None if all do, or if none of them judges.
    """

    source: int
    teacher: Captured
    merged: Captured
    drift: Tensor
    numbers: range
    counted: Tensor | None = None

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.numbers)


def see(
    walk: Walk, group: int, units: Sequence[Unit], stream: Stream, split: Split | None
) -> Iterator[Seen]:
    """Run a stream through a teacher's part and the merged part, chunk by chunk.

    For routers and experts, the teacher's inputs are recorded as well.
    """
    weights = _teacher_weights(walk, group, units, stream)
    for chunk, teacher_x, merged_x in walk.pairs(stream, split):
        teacher = _see_teacher(walk, group, units, stream, chunk, weights, teacher_x)
        merged = _see_merged(walk, group, units, stream, chunk, merged_x)
        drift = _drift(walk, group, teacher, merged, teacher_x - merged_x)
        counted = stream.judging(chunk)
        if counted is not None:
            counted = counted.to(walk.device)
        yield Seen(stream.source, teacher, merged, drift, stream.share.numbers[chunk], counted)


def _teacher_weights(
    walk: Walk, group: int, units: Sequence[Unit], stream: Stream
) -> dict[str, Tensor]:
    """The teacher's weights that a group's fit needs; no others, since each is copied to fp32.

    If outputs are cached, the teacher does not run again, or only as far as routers and experts.
    """
    if not walk.teacher_outputs.keep:
        return walk.teacher_weights(stream)
    if not any(unit.kind in ("router", "experts") for unit in units):
        return {}
    later = (unit for own in walk.anatomy.groups[group:] for unit in own)
    idle = {u.parameter(p) for u in later if u.kind == "experts" for p in u.parameters}
    return walk.teacher_weights(stream, without=idle)


def _see_teacher(
    walk: Walk,
    group: int,
    units: Sequence[Unit],
    stream: Stream,
    chunk: slice,
    weights: dict[str, Tensor],
    x: Tensor,
) -> Captured:
    """Outputs of the teacher's units for a chunk: the group's, and those its targets need."""
    norms = [u.write.through for u in units if u.write and u.write.through]
    others = [u for u in (*walk.anatomy.writers_before(group), *units) if u.kind != "router"]
    wanted = dict.fromkeys([*(unit.name for unit in others), *norms])
    entered = tuple(u.name for u in units if u.kind in ("router", "experts"))
    teacher, cache = walk.teachers[stream.source], walk.teacher_outputs
    if not cache.keep:
        return teacher.captured(weights, x, inputs=entered, outputs=tuple(wanted))
    if not entered:
        only = frozenset(wanted)
        return Captured(outputs=_wide(cache.of(stream.source, chunk, walk.device, only=only)))
    known = cache.of(stream.source, chunk, walk.device)
    seen = teacher.captured(weights, x, inputs=entered, known=known)
    seen.outputs.update(_wide({name: known[name] for name in wanted}))
    return seen


def _see_merged(
    walk: Walk, group: int, units: Sequence[Unit], stream: Stream, chunk: slice, x: Tensor
) -> Captured:
    """The group's input in the merged part, and the outputs of the writers before it."""
    known = walk.known(stream, chunk)
    writers = [unit.name for unit in walk.anatomy.writers_before(group)]
    settled = (
        [unit.name for unit in walk.settled_linears(group)] if walk.merged_outputs.keep else []
    )
    wanted = [name for name in dict.fromkeys([*writers, *settled]) if name not in known]
    seen = walk.part.captured(
        walk.weights, x, inputs=(units[0].name,), outputs=tuple(wanted), known=known
    )
    new = {name: seen.outputs[name] for name in settled if name in seen.outputs}
    walk.merged_outputs.add(stream.source, chunk, new, seen.precisions)
    seen.outputs.update(_wide(known))
    return seen


def _wide(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs in fp32, as they are captured."""
    return {name: output.float() for name, output in outputs.items()}


def _drift(walk: Walk, group: int, teacher: Captured, merged: Captured, entering: Tensor) -> Tensor:
    """The residual stream of the teacher minus that of the merged model, before the group.

    Args:
        entering: the same difference at the input of the part.
    """
    if not walk.part.residual:
        return torch.zeros((), device=walk.device)
    drift = walk.anatomy.residual_scale * entering
    for writer in walk.anatomy.writers_before(group):
        assert writer.write is not None
        added = teacher.outputs[writer.name] - merged.outputs[writer.name]
        drift = drift + writer.write.scale * added.reshape(drift.shape)
    return drift
