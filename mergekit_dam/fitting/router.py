"""The fit of a router: to the logits that each teacher's own router makes of its own stream."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from mergekit_dam.anatomy import Unit
from mergekit_dam.fitting.gather import Seen, gather, token_weights
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.moments import InputMoments, LinearMoments, LinearTokens
from mergekit_dam.fitting.solver import precision
from mergekit_dam.fitting.state import Walk
from mergekit_dam.fitting.streams import Stream
from mergekit_dam.fitting.tensors import FittedTensor


def fit_routers(walk: Walk, stage: int, units: list[Unit]) -> Iterator[tuple[str, FittedTensor]]:
    """Fit the weight of the one router of a stage; a bias keeps the average.

    Yields:
        (name relative to the part, fitted tensor).
    """
    (unit,) = units
    weight = walk.weight(unit)
    experts, columns = weight.tensors[0].shape
    dtype = precision(columns * weight.settings.parametrisation.expand.shape[1])

    def empty(stream: Stream) -> dict[str, LinearMoments]:
        inputs = InputMoments.zeros(columns, walk.device, dtype)
        return {unit.name: LinearMoments.zeros(experts, inputs, walk.metric(unit.name, stream))}

    def judges(stream: Stream) -> dict[str, LinearTokens]:
        return {unit.name: LinearTokens(walk.metric(unit.name, stream))}

    def add(sums: Mapping[str, LinearMoments] | Mapping[str, LinearTokens], seen: Seen) -> None:
        x, own = (_flat(c.inputs[unit.name]) for c in (seen.merged, seen.teacher))
        logits = own @ weight.teacher(seen.source).T
        counted = token_weights([logits], seen.sequences)
        moments = sums[unit.name]
        if isinstance(moments, LinearMoments):
            moments.inputs.add(x, counted)
        moments.add(x, logits, logits, counted)

    evidence = gather(
        walk, stage, units, empty=empty, judges=judges, add=add, pool=not walk.metrics
    )
    (fitted,) = fit_linear(weight, None, evidence[unit.name], axis=unit.axis)
    report = replace(fitted.report, kind="router")
    yield unit.parameter("weight"), replace(fitted, report=report)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
