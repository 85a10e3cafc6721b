"""Gathering a stage's moments: what enters it, what it should put out, over all data.

The target of a unit inside a part is the teacher's own output. For one that writes to the
residual stream with scale s it is `y_teacher + (r_teacher - r_merged) / s`, where r are the
residual streams as they stand at that point. Where a norm stands between, `s * norm(y)` is
what is added: the target is the y whose norm is `norm(y_teacher) + (r_teacher - r_merged) / s`
and whose size, which a norm does not see, is the teacher's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.anatomy import Captured, Unit
from mergekit_dam.fitting.moments import Evidence, M
from mergekit_dam.fitting.state import Walk
from mergekit_dam.fitting.streams import Split, Stream

_SMALLEST_GAIN = 1e-3
"""Gain of a norm, relative to its largest, under which a feature cannot be steered through it."""


@dataclass(frozen=True)
class Seen:
    """What the teacher and the merged part did with one chunk.

    `drift` is the residual stream of the teacher less that of the merged model, as it stands
    where the units of the stage add to it.
    """

    teacher: Captured
    merged: Captured
    drift: Tensor


def gather(
    walk: Walk,
    stage: int,
    units: Sequence[Unit],
    *,
    empty: Callable[[], dict[str, M]],
    add: Callable[[dict[str, M], Seen], None],
) -> dict[str, Evidence[M]]:
    """Sum the moments of a stage's units over all streams.

    Every stream is weighted by its loss weight over the energy of its teacher's output, so
    that no model's data counts for more because its activations are large.

    Args:
        empty: makes empty moments for every unit, by name.
        add: adds a chunk to such moments.
    """
    pooled: dict[Split, dict[str, M]] = {"fit": empty(), "held_out": empty()}
    judged_on: Split = "held_out" if all(s.held_out for s in walk.streams) else "fit"
    totals = {
        unit.name: sum(walk.weight(unit).settings.loss_weights[s.source] for s in walk.streams)
        for unit in units
    }
    for stream in walk.streams:
        weights = walk.teacher_weights(stream)
        for split, sums in pooled.items():
            own = empty()
            for _, teacher_x, merged_x in walk.pairs(stream, split):
                add(own, _see(walk, stage, units, stream, weights, teacher_x, merged_x))
            for unit in units:
                loss_weight = walk.weight(unit).settings.loss_weights[stream.source]
                energy = max(own[unit.name].energy, 1e-30)
                sums[unit.name].add_scaled(own[unit.name], loss_weight / energy)
    return {
        name: Evidence(moments, pooled[judged_on][name], totals[name])
        for name, moments in pooled["fit"].items()
    }


def _see(
    walk: Walk,
    stage: int,
    units: Sequence[Unit],
    stream: Stream,
    teacher_weights: dict[str, Tensor],
    teacher_x: Tensor,
    merged_x: Tensor,
) -> Seen:
    """Run one chunk through teacher and merged part, up to the stage."""
    writers = walk.anatomy.writers_before(stage)
    norms = [u.write.through for u in units if u.write and u.write.through]
    wanted = dict.fromkeys([*(u.name for u in (*writers, *units)), *norms])
    teacher = walk.teachers[stream.source].captured(
        teacher_weights, teacher_x, outputs=tuple(wanted)
    )
    merged = walk.part.captured(
        walk.weights,
        merged_x,
        inputs=(units[0].name,),
        outputs=tuple(writer.name for writer in writers),
    )
    drift = torch.zeros((), device=merged_x.device)
    if walk.part.residual:
        drift = walk.anatomy.residual_scale * (teacher_x - merged_x)
    for writer in writers:
        assert writer.write is not None
        added = teacher.outputs[writer.name] - merged.outputs[writer.name]
        drift = drift + writer.write.scale * added.reshape(drift.shape)
    return Seen(teacher, merged, drift)


def target(walk: Walk, unit: Unit, seen: Seen) -> Tensor:
    """What a unit should put out for a chunk, in the shape of its output."""
    output = seen.teacher.outputs[unit.name]
    if unit.write is None:
        return output
    missing = (seen.drift / unit.write.scale).reshape(output.shape)
    if unit.write.through is None:
        return output + missing
    norm = next(u for u in walk.anatomy.units if u.name == unit.write.through)
    own = {p: walk.weights[norm.parameter(p)] for p in norm.parameters}
    wanted = seen.teacher.outputs[norm.name] + missing - own.get("bias", 0)
    return _before_norm(output, wanted, own["weight"] + norm.unit_gain)


def _before_norm(output: Tensor, wanted: Tensor, gain: Tensor) -> Tensor:
    """The y of the teacher's size whose norm `gain * n(y)` points where it is wanted.

    Args:
        output: teacher's y `[..., features]`; features with hardly any gain keep it.
        wanted: the norm's output to reach, without bias.
        gain: of the merged norm, `[features]`.
    """
    steered = gain.abs() > _SMALLEST_GAIN * gain.abs().max()
    normalised = wanted / torch.where(steered, gain, 1)
    inner = (normalised * output * steered).sum(-1, keepdim=True)
    size = inner / (normalised.square() * steered).sum(-1, keepdim=True).clamp_min(1e-12)
    # A negative size would turn the output around: the streams are too far apart to repair.
    return torch.where(steered & (size > 0), size * normalised, output)
