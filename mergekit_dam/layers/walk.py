"""The walk through one part of the model, stage by stage, in the order the data passes.

1. Everything starts at the weighted average.
2. Each teacher's part runs on its own stream; what its units put out is kept, if it fits.
3. For each stage (units that see one input), moments are gathered over all calibration data:
   the merged stream's inputs against what the teachers put out.
4. Each unit of the stage is fitted, judged on held-out data, and merged; what follows sees
   the merged unit.
5. After the last stage both streams move on through the part.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_dam.coefficients.tensors import FittedTensor
from mergekit_dam.fitting.judged import unfitted
from mergekit_dam.layers.groups import FITS, Settled
from mergekit_dam.layers.head import fit_head
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.hooks import Captured
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.outputs import cache_bytes, outputs_size
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream


@torch.no_grad()
def walk_part(walk: Walk, *, advance: bool = True) -> list[FittedTensor]:
    """Fit every tensor of a part and move the streams through it.

    Args:
        walk: at its start; its streams are moved on in place.
        advance: move the streams through the part at the end.

    Returns:
        One entry per tensor, in the order of the walk's sources.
    """
    leaving = _play_teachers(walk, to_the_end=advance)
    for index, group in enumerate(walk.anatomy.groups):
        for name, fitted in _fits(walk, index, group):
            walk.settle(name, fitted)
    _settle_rest(walk)
    if advance:
        _advance(walk, leaving)
    return [walk.fitted[name] for name in walk.sources]


def _fits(walk: Walk, index: int, group: Sequence[Unit]) -> Settled:
    """The fit of one stage, by the kind of its units; nothing where they are not to be fitted."""
    first = group[0]
    if first.name == walk.head:
        if walk.fittable(first, "head"):
            yield from fit_head(walk, first, temperature=walk.temperature)
    elif first.kind in FITS:
        units = [unit for unit in group if walk.fittable(unit)]
        yield from FITS[first.kind](walk, index, units) if units else ()


def _settle_rest(walk: Walk) -> None:
    """Give every tensor that was not fitted its average, and the reason."""
    owner = {unit.parameter(p): unit for unit in walk.anatomy.units for p in unit.parameters}
    fitted = frozenset(walk.fitted)
    for name, tensor in walk.sources.items():
        if name in walk.fitted:
            continue
        unit = owner.get(name)
        if unit is None:
            kind, reason = "other", "averaged: its module does not run on text"
        elif tensor.alone:
            kind, reason = unit.kind, "copied: of one model alone"
        elif tensor.identical:
            kind, reason = unit.kind, "identical in all models"
        elif any(unit.parameter(p) not in walk.sources for p in unit.parameters):
            kind, reason = unit.kind, "averaged: belongs to a weight that is tied"
        elif unit.kind == "other":
            kind, reason = unit.kind, "averaged: neither linear, norm nor embedding"
        elif unit.kind == "experts":
            kind, reason = unit.kind, "averaged: of experts, linears alone are fitted"
        elif unit.kind == "router":
            kind, reason = unit.kind, "averaged: of a router, the weight alone is fitted"
        elif unit.parameter("weight") in fitted:
            kind, reason = unit.kind, "averaged: of the head, the weight alone is fitted"
        else:
            kind, reason = unit.kind, "averaged, as configured"
        # What the part has run on is the average as it is written.
        walk.skip(name, unfitted(tensor, walk.weights[name].to(tensor.dtype), kind, reason))


def _play_teachers(walk: Walk, *, to_the_end: bool) -> list[Sequences]:
    """Run every teacher once and keep what the fits will ask for, if it fits in memory.

    Returns:
        What leaves each teacher; nothing if they do not run to the end.
    """
    recorded = walk.recorded_units()
    if to_the_end:
        return [stream.keep(_play(walk, stream, recorded)) for stream in walk.streams]
    for stream in walk.streams if recorded else ():
        weights = walk.teacher_weights(stream)
        for chunk, x, _ in walk.pairs(stream, None):
            captured = walk.teachers[stream.source].captured(weights, x, outputs=recorded)
            if not _record(walk, stream, chunk, captured):
                return []
    return []


def _play(walk: Walk, stream: Stream, recorded: tuple[str, ...]) -> Iterator[Tensor]:
    """What leaves a teacher, chunk by chunk."""
    weights = walk.teacher_weights(stream)
    for chunk, x, _ in walk.pairs(stream, None):
        leaving, captured = walk.teachers[stream.source].through(weights, x, outputs=recorded)
        _record(walk, stream, chunk, captured)
        yield leaving


def _record(walk: Walk, stream: Stream, chunk: slice, captured: Captured) -> bool:
    """Keep what a teacher's units put out; the first chunk tells whether there is room."""
    cache = walk.teacher_outputs
    if cache.keep is None:
        tokens = (chunk.stop - chunk.start) * stream.teacher.shape[1]
        size = cache_bytes(outputs_size(captured.outputs) * _tokens(walk) // tokens)
        cache.keep = walk.merged_outputs.keep = cache.storage.has_room_for_outputs(size)
    cache.add(stream.source, chunk, captured.outputs)
    return cache.keep


def _tokens(walk: Walk) -> int:
    return sum(stream.teacher.shape[0] * stream.teacher.shape[1] for stream in walk.streams)


def _advance(walk: Walk, leaving: Sequence[Sequences]) -> None:
    """Run the merged streams through the part; the teachers' have been."""
    for stream, teacher in zip(walk.streams, leaving, strict=True):
        stream.merged = stream.keep(_merged_leaving(walk, stream))
        stream.teacher = teacher


def _merged_leaving(walk: Walk, stream: Stream) -> Iterator[Tensor]:
    for chunk, _, x in walk.pairs(stream, None):
        yield walk.part.through(walk.weights, x, known=walk.known(stream, chunk))[0]
