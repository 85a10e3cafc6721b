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

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mergekit_dam.fitting.evidence import Evidence, Judge, M
from mergekit_dam.fitting.moments import LinearMoments
from mergekit_dam.layers.seen import Seen, see
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.share import Split, judging_split
from mergekit_dam.streams.stream import Stream


def gather(
    walk: Walk,
    group: int,
    units: Sequence[Unit],
    *,
    empty: Callable[[Stream], Mapping[str, M]],
    judges: Callable[[Stream], Mapping[str, Judge]],
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
    held_out: dict[str, list[Judge]] = {unit.name: [] for unit in units}
    judged_on = judging_split(stream.share for stream in walk.streams)
    loss_weights = {unit.name: walk.weight(unit).settings.loss_weights for unit in units}

    def factor(name: str, sums: Judge, stream: Stream) -> float:
        size = sums.energy if pool else sums.count
        return loss_weights[name][stream.source] / max(size, 1e-30)

    for stream in walk.streams:
        own = empty(stream)
        _see(walk, group, units, stream, "fit", partial(add, own))
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
            _see(walk, group, units, stream, "held_out", partial(add, judging))
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


def _add_up(own: Mapping[str, Judge]) -> None:
    """Take the sums of other processes into those of a stage's units, shared ones once."""
    shared = {id(s.inputs): s.inputs for s in own.values() if isinstance(s, LinearMoments)}
    for inputs in shared.values():
        inputs.add_up()
    for sums in own.values():
        sums.add_up()


def _see(
    walk: Walk,
    group: int,
    units: Sequence[Unit],
    stream: Stream,
    split: Split,
    add: Callable[[Seen], None],
) -> None:
    """Show what a teacher and the merged part do with a stream, chunk by chunk."""
    for seen in see(walk, group, units, stream, split):
        add(seen)
