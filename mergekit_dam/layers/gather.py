"""Sums over all calibration data of the moments of a group's inputs and targets."""

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
    on_host: bool = False,
) -> dict[str, Evidence[M]]:
    """Sum the moments of a group's units over all streams, and collect the data that judges them.

    The weight of a stream is its loss weight divided by the energy of its teacher's output, so
    that no model's data counts for more because its activations are large. Where the errors of
    each stream have their own metric, the divisor is the sum of the tokens' weights.

    Args:
        empty: makes empty moments of a stream for every unit, by name.
        judges: makes the same for held-out data.
        add: adds a chunk to either of them.
        pool: whether to add the streams up, because their errors have the same metric.
        on_host: whether the matrices of streams that are not added up are kept on the host.
    """
    pools: dict[str, Pool[M]] = {unit.name: Pool(measured_alike=pool) for unit in units}
    judged_on = judging_split(stream.share for stream in walk.streams)
    loss_weights = {unit.name: walk.weight(unit).settings.loss_weights for unit in units}

    def sized(name: str, sums: Judge, stream: Stream) -> tuple[float, float]:
        return loss_weights[name][stream.source], float(sums.energy if pool else sums.count)

    def fill(sums: Mapping[str, Any], stream: Stream, split: Split) -> None:
        for seen in see(walk, group, units, stream, split):
            add(sums, seen)
        _add_up(sums)

    for stream in walk.streams:
        own = empty(stream)
        fill(own, stream, "fit")
        for name, sums in own.items():
            if on_host and isinstance(sums, LinearMoments):
                sums.keep_on_host()
            pools[name].add(sums, *sized(name, sums, stream))
        del own, sums
        if judged_on == "held_out":
            judging = judges(stream)
            fill(judging, stream, "held_out")
            for name, judge in judging.items():
                pools[name].add_held_out(judge, *sized(name, judge, stream))
    return {name: own_pool.evidence() for name, own_pool in pools.items()}


def _add_up(own: Mapping[str, Judge]) -> None:
    """Add the sums of the other processes to those of a group's units; shared inputs once."""
    shared = {id(s.inputs): s.inputs for s in own.values() if isinstance(s, LinearMoments)}
    for inputs in shared.values():
        inputs.add_up()
    for sums in own.values():
        sums.add_up()
