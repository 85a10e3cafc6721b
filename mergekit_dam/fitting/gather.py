"""Gathering a stage's moments: what enters it, what it should put out, over all data.

The target of a unit inside a part is the teacher's own output. For one that writes to the
residual stream with scale s it is `y_teacher + (r_teacher - r_merged) / s`, where r are the
residual streams as they stand at that point. Where a norm stands between, `s * norm(y)` is
what is added: the target is the y whose norm is `norm(y_teacher) + (r_teacher - r_merged) / s`
and whose size, which a norm does not see, is the teacher's.

A few tokens (the first of a sequence, delimiters) carry activations, and drifts, hundreds of
times as large as the others'. No weight is to be spent on them alone: a token counts in full
up to the median energy of its sequence's targets, beyond that in inverse proportion.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.anatomy import Unit
from mergekit_dam.fitting.judge import judging_split
from mergekit_dam.fitting.moments import Evidence, LinearMoments, M, Sums
from mergekit_dam.fitting.state import Walk
from mergekit_dam.fitting.streams import Split, Stream
from mergekit_dam.hooks import Captured

_SMALLEST_GAIN = 1e-3
"""Gain of a norm, relative to its largest, under which a feature cannot be steered through it."""


@dataclass(frozen=True)
class Seen:
    """What the teacher and the merged part did with one chunk.

    `drift` is the residual stream of the teacher less that of the merged model, as it stands
    where the units of the stage add to it; `sequences` is the number of sequences, `source` that
    of the teacher.
    """

    source: int
    teacher: Captured
    merged: Captured
    drift: Tensor
    sequences: int


def gather(
    walk: Walk,
    stage: int,
    units: Sequence[Unit],
    *,
    empty: Callable[[Stream], Mapping[str, M]],
    judges: Callable[[Stream], Mapping[str, Sums]],
    add: Callable[[Mapping[str, Any], Seen], None],
    pool: bool,
) -> dict[str, Evidence[M]]:
    """Sum the moments of a stage's units over all streams, and keep what judges them.

    Every stream is weighted by its loss weight, over the energy of its teacher's output, so that
    no model's data counts for more because its activations are large; or over the number of its
    tokens, where a metric of its own says how much its errors count.

    Args:
        empty: makes empty moments of a stream for every unit, by name.
        judges: the same for data that is held out.
        add: adds a chunk to either.
        pool: add the streams up: they are measured alike.
    """
    fit: dict[str, list[M]] = {unit.name: [] for unit in units}
    held_out: dict[str, list[Sums]] = {unit.name: [] for unit in units}
    judged_on = judging_split(walk.streams)
    loss_weights = {unit.name: walk.weight(unit).settings.loss_weights for unit in units}

    def factor(name: str, sums: Sums, stream: Stream) -> float:
        size = sums.energy if pool else sums.count
        return loss_weights[name][stream.source] / max(size, 1e-30)

    for stream in walk.streams:
        own = empty(stream)
        _see(walk, stage, units, stream, "fit", partial(add, own))
        _add_up(own)
        for name, sums in own.items():
            scale = factor(name, sums, stream)
            if not pool:
                sums.scale = scale
                fit[name].append(sums)
            elif fit[name]:
                fit[name][0].add_scaled(sums, scale)
            else:
                fit[name].append(sums.scaled(scale))
        del own, sums
        if judged_on == "held_out":
            judging = judges(stream)
            _see(walk, stage, units, stream, "held_out", partial(add, judging))
            _add_up(judging)
            for name, tokens in judging.items():
                tokens.scale = factor(name, tokens, stream)
                held_out[name].append(tokens)
    return {
        name: Evidence(
            moments,
            held_out[name] if judged_on == "held_out" else moments,
            sum(loss_weights[name][stream.source] for stream in walk.streams),
        )
        for name, moments in fit.items()
    }


def _add_up(own: Mapping[str, Sums]) -> None:
    """Take the sums of other processes into those of a stage's units, shared ones once."""
    shared = {id(s.inputs): s.inputs for s in own.values() if isinstance(s, LinearMoments)}
    for inputs in shared.values():
        inputs.add_up()
    for sums in own.values():
        sums.add_up()


def _see(
    walk: Walk,
    stage: int,
    units: Sequence[Unit],
    stream: Stream,
    split: Split,
    add: Callable[[Seen], None],
) -> None:
    """Show what a teacher and the merged part do with a stream, chunk by chunk."""
    for seen in see(walk, stage, units, stream, split):
        add(seen)


def see(
    walk: Walk, stage: int, units: Sequence[Unit], stream: Stream, split: Split | None
) -> Iterator[Seen]:
    """What a teacher and the merged part do with a stream, chunk by chunk.

    Of routers and experts it is also seen what enters the teacher's.
    """
    weights = _teacher_weights(walk, stage, units, stream)
    for chunk, teacher_x, merged_x in walk.pairs(stream, split):
        teacher = _see_teacher(walk, stage, units, stream, chunk, weights, teacher_x)
        merged = _see_merged(walk, stage, units, stream, chunk, merged_x)
        drift = _drift(walk, stage, teacher, merged, teacher_x - merged_x)
        yield Seen(stream.source, teacher, merged, drift, teacher_x.shape[0])


def _teacher_weights(
    walk: Walk, stage: int, units: Sequence[Unit], stream: Stream
) -> dict[str, Tensor]:
    """What a teacher is run on to see a stage; converted to fp32, so no more than is needed.

    Where outputs are kept it does not run again, or no further than to routers and experts.
    """
    if not walk.teacher_tape.keep:
        return walk.teacher_weights(stream)
    if not any(unit.kind in ("router", "experts") for unit in units):
        return {}
    later = (unit for own in walk.anatomy.stages[stage:] for unit in own)
    idle = {u.parameter(p) for u in later if u.kind == "experts" for p in u.parameters}
    return walk.teacher_weights(stream, without=idle)


def _see_teacher(
    walk: Walk,
    stage: int,
    units: Sequence[Unit],
    stream: Stream,
    chunk: slice,
    weights: dict[str, Tensor],
    x: Tensor,
) -> Captured:
    """What the teacher's units put out for a chunk: of the stage, and of what its targets need."""
    norms = [u.write.through for u in units if u.write and u.write.through]
    others = [u for u in (*walk.anatomy.writers_before(stage), *units) if u.kind != "router"]
    wanted = dict.fromkeys([*(unit.name for unit in others), *norms])
    entered = tuple(u.name for u in units if u.kind in ("router", "experts"))
    teacher, tape = walk.teachers[stream.source], walk.teacher_tape
    if not tape.keep:
        return teacher.captured(weights, x, inputs=entered, outputs=tuple(wanted))
    if not entered:
        only = frozenset(wanted)
        return Captured(outputs=tape.of(stream.source, chunk, walk.device, only=only))
    known = tape.of(stream.source, chunk, walk.device)
    seen = teacher.captured(weights, x, inputs=entered, known=known)
    seen.outputs.update({name: known[name] for name in wanted})
    return seen


def _see_merged(
    walk: Walk, stage: int, units: Sequence[Unit], stream: Stream, chunk: slice, x: Tensor
) -> Captured:
    """What enters the stage in the merged part, and what the writers before it put out."""
    known = walk.known(stream, chunk)
    writers = [unit.name for unit in walk.anatomy.writers_before(stage)]
    settled = [unit.name for unit in walk.settled_linears(stage)] if walk.merged_tape.keep else []
    wanted = [name for name in dict.fromkeys([*writers, *settled]) if name not in known]
    seen = walk.part.captured(
        walk.weights, x, inputs=(units[0].name,), outputs=tuple(wanted), known=known
    )
    new = {name: seen.outputs[name] for name in settled if name in seen.outputs}
    walk.merged_tape.add(stream.source, chunk, new)
    seen.outputs.update(known)
    return seen


def _drift(walk: Walk, stage: int, teacher: Captured, merged: Captured, entering: Tensor) -> Tensor:
    """The residual stream of the teacher less that of the merged model, before the stage.

    Args:
        entering: the same difference where the part begins.
    """
    if not walk.part.residual:
        return torch.zeros((), device=walk.device)
    drift = walk.anatomy.residual_scale * entering
    for writer in walk.anatomy.writers_before(stage):
        assert writer.write is not None
        added = teacher.outputs[writer.name] - merged.outputs[writer.name]
        drift = drift + writer.write.scale * added.reshape(drift.shape)
    return drift


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


def token_weights(targets: Sequence[Tensor], sequences: int) -> Tensor:
    """Weights of a chunk's tokens, fp32 `[tokens]`, in (0, 1].

    Args:
        targets: of the units of one stage, each `[..., features]` with the sequences first;
            relative to the median, their energies are averaged.
        sequences: number of sequences. Medians are theirs, so that chunks do not matter.
    """
    relative = []
    for wanted in targets:
        energy = wanted.reshape(-1, wanted.shape[-1]).square().sum(-1).reshape(sequences, -1)
        median = energy.median(dim=1, keepdim=True).values
        relative.append(energy / median.clamp_min(1e-30))
    mean = torch.stack(relative).mean(0)
    return mean.clamp_min(1).reciprocal().reshape(-1)


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
