"""The walk through one part of the model, group by group, in forward order.

1. All tensors start at the weighted average.
2. Each teacher's part runs on its own stream; the outputs of its units are cached if they fit.
3. For each group (units that share one input), moments are summed over all calibration data:
   the merged stream's inputs against the teachers' outputs.
4. Each unit of the group is fitted, judged on held-out data, and merged; later groups see the
   merged unit.
5. After the last group both streams advance through the part.
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
from mergekit_dam.streams.outputs import cache_bytes, outputs_sizes
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream


@torch.no_grad()
def walk_part(walk: Walk, *, advance: bool = True) -> list[FittedTensor]:
    """Fit every tensor of a part and move the streams through it.

    Args:
        walk: the walk before its first group; its streams are advanced in place.
        advance: whether to run the streams through the part at the end.

    Returns:
        One entry per tensor, in the order of the walk's sources.
    """
    leaving = _play_teachers(walk, to_the_end=advance)
    for index, group in enumerate(walk.anatomy.groups):
        for name, fitted in _fits(walk, index, group):
            walk.settle(name, fitted)
        lasting = walk.lasting()
        walk.teacher_outputs.forget(unit.name for unit in group if unit.name not in lasting)
    _settle_rest(walk)
    if advance:
        _advance(walk, leaving)
    return [walk.fitted[name] for name in walk.sources]


def _fits(walk: Walk, index: int, group: Sequence[Unit]) -> Settled:
    """The fit of one group, by the kind of its units; nothing if they are not to be fitted."""
    first = group[0]
    if first.name == walk.head:
        if walk.fittable(first, "head"):
            yield from fit_head(walk, first, temperature=walk.temperature)
    elif first.kind in FITS:
        units = [unit for unit in group if walk.fittable(unit)]
        yield from FITS[first.kind](walk, index, units) if units else ()


def _settle_rest(walk: Walk) -> None:
    """Give every tensor that was not fitted its average, and record the reason."""
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
            kind, reason = unit.kind, "averaged: only the linears of experts are fitted"
        elif unit.kind == "router":
            kind, reason = unit.kind, "averaged: only the weight of a router is fitted"
        elif unit.parameter("weight") in fitted:
            kind, reason = unit.kind, "averaged: only the weight of the head is fitted"
        else:
            kind, reason = unit.kind, "averaged, as configured"
        # The part has run on this average, rounded to the dtype that is written.
        walk.skip(name, unfitted(tensor, walk.weights[name].to(tensor.dtype), kind, reason))


def _play_teachers(walk: Walk, *, to_the_end: bool) -> list[Sequences]:
    """Run every teacher once and cache the outputs that the fits will need, if memory allows.

    Returns:
        The output of each teacher's part; empty if the teachers do not run to the end.
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
    """The output of a teacher's part, chunk by chunk."""
    weights = walk.teacher_weights(stream)
    for chunk, x, _ in walk.pairs(stream, None):
        leaving, captured = walk.teachers[stream.source].through(weights, x, outputs=recorded)
        _record(walk, stream, chunk, captured)
        yield leaving


def _record(walk: Walk, stream: Stream, chunk: slice, captured: Captured) -> bool:
    """Cache the outputs of a teacher's units; the first chunk decides whether there is room."""
    cache = walk.teacher_outputs
    if cache.keep is None:
        tokens = (chunk.stop - chunk.start) * stream.teacher.shape[1]
        sizes = outputs_sizes(captured.outputs, captured.precisions, cache.storage.outputs)
        size = cache_bytes(sizes, walk.lasting()) * _tokens(walk) // tokens
        cache.keep = walk.merged_outputs.keep = cache.storage.has_room_for_outputs(size)
    cache.add(stream.source, chunk, captured.outputs, captured.precisions)
    return cache.keep


def _tokens(walk: Walk) -> int:
    return sum(stream.teacher.shape[0] * stream.teacher.shape[1] for stream in walk.streams)


def _advance(walk: Walk, leaving: Sequence[Sequences]) -> None:
    """Run the merged streams through the part; the teachers' streams have been run already."""
    for stream, teacher in zip(walk.streams, leaving, strict=True):
        stream.merged = stream.keep(_merged_leaving(walk, stream))
        stream.teacher = teacher


def _merged_leaving(walk: Walk, stream: Stream) -> Iterator[Tensor]:
    for chunk, _, x in walk.pairs(stream, None):
        yield walk.part.through(walk.weights, x, known=walk.known(stream, chunk))[0]
