"""Sums of a group's moments: what enters it, what it should put out, over all data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergekit_dam.fitting.evidence import Evidence, Judge, M, Pool
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
    pools: dict[str, Pool[M]] = {unit.name: Pool(measured_alike=pool) for unit in units}
    judged_on = judging_split(stream.share for stream in walk.streams)
    loss_weights = {unit.name: walk.weight(unit).settings.loss_weights for unit in units}

    def scale(name: str, sums: Judge, stream: Stream) -> float:
        size = sums.energy if pool else sums.count
        return loss_weights[name][stream.source] / max(size, 1e-30)

    def fill(sums: Mapping[str, Any], stream: Stream, split: Split) -> None:
        for seen in see(walk, group, units, stream, split):
            add(sums, seen)
        _add_up(sums)

    for stream in walk.streams:
        own = empty(stream)
        fill(own, stream, "fit")
        for name, sums in own.items():
            pools[name].add(sums, scale(name, sums, stream))
        del own, sums
        if judged_on == "held_out":
            judging = judges(stream)
            fill(judging, stream, "held_out")
            for name, judge in judging.items():
                pools[name].add_held_out(judge, scale(name, judge, stream))
    return {
        name: own_pool.evidence(sum(loss_weights[name][stream.source] for stream in walk.streams))
        for name, own_pool in pools.items()
    }


def _add_up(own: Mapping[str, Judge]) -> None:
    """Take the sums of other processes into those of a stage's units, shared ones once."""
    shared = {id(s.inputs): s.inputs for s in own.values() if isinstance(s, LinearMoments)}
    for inputs in shared.values():
        inputs.add_up()
    for sums in own.values():
        sums.add_up()
