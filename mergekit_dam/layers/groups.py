"""The fit of one group of units: one function for each kind of unit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_dam.coefficients.tensors import FittedTensor
from mergekit_dam.fitting.embedding import Usage, fit_embedding
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.features import FeatureMoments
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.moments import InputMoments, LinearMoments, LinearTokens, kept_bytes
from mergekit_dam.fitting.norm import fit_norm
from mergekit_dam.fitting.solver import precision
from mergekit_dam.layers.experts import fit_experts
from mergekit_dam.layers.gather import gather
from mergekit_dam.layers.judged_tokens import judging_rows, stride
from mergekit_dam.layers.seen import Seen
from mergekit_dam.layers.state import Walk
from mergekit_dam.layers.targets import flat, target, token_weights
from mergekit_dam.model.anatomy import norm_parts
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.distributed import all_sum
from mergekit_dam.streams.memory import give_back, memory_of
from mergekit_dam.streams.share import Split, judging_split
from mergekit_dam.streams.storage import may_stay
from mergekit_dam.streams.stream import Stream

Settled = Iterator[tuple[str, FittedTensor]]
"""(name relative to the part, fitted tensor) for each tensor that a group settles."""

_ALL: Tensor | slice = slice(None)

Targets = Callable[[Seen], Mapping[str, tuple[Tensor, Tensor]]]
"""From a chunk to each unit's target and the teacher's own output, by unit name."""


def fit_linears(walk: Walk, group: int, units: list[Unit]) -> Settled:
    """Fit linears that share an input, from one pass over the data; each weight, then its bias."""

    def targets(seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
        outputs = seen.teacher.outputs
        return {unit.name: (target(walk, unit, seen), outputs[unit.name]) for unit in units}

    evidence = _linear_evidence(walk, group, units, targets)
    give_back()  # memory of the forward passes: solving needs blocks of other sizes
    for unit in units:
        weight, bias = walk.weight_to_fit(unit), walk.bias(unit)
        yield from _named(
            walk, unit, fit_linear(weight, bias, evidence.pop(unit.name), axis=unit.axis)
        )
        del weight, bias


def fit_routers(walk: Walk, group: int, units: list[Unit]) -> Settled:
    """Fit the weight of the one router of a group; a bias keeps the average.

    The target is the logits of each teacher's own router on the teacher's own stream.
    """
    (unit,) = units
    weight = walk.weight_to_fit(unit)

    def targets(seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
        logits = flat(seen.teacher.inputs[unit.name]) @ weight.teacher(seen.source).float().T
        return {unit.name: (logits, logits)}

    evidence = _linear_evidence(walk, group, units, targets)[unit.name]
    (fitted,) = fit_linear(weight, None, evidence, axis=unit.axis)
    report = replace(fitted.report, kind="router")
    yield from _named(walk, unit, [replace(fitted, report=report)])


def _linear_evidence(
    walk: Walk, group: int, units: list[Unit], targets: Targets
) -> dict[str, Evidence[LinearMoments]]:
    """The moments of linears that share an input, and the data that judges them."""
    shapes = {unit.name: _out_in(walk, unit) for unit in units}
    first = units[0]
    columns = shapes[first.name][1]
    dtype = precision(columns * walk.weight(first).settings.parametrisation.expand.shape[1])

    every = {stream.source: stride(stream.number_counted("held_out")) for stream in walk.streams}
    # Squares in metrics cost much; they are needed where the data of the fit judges it.
    judged_apart = judging_split(stream.share for stream in walk.streams) == "held_out"

    metrics = {s.source: {name: walk.metric(name, s) for name in shapes} for s in walk.streams}

    def empty(stream: Stream) -> dict[str, LinearMoments]:
        inputs = InputMoments.zeros(columns, walk.device, dtype)
        own = metrics[stream.source]
        return {
            name: LinearMoments.zeros(
                out, inputs, own[name], squares=own[name].plain or not judged_apart
            )
            for name, (out, _) in shapes.items()
        }

    def judges(stream: Stream) -> dict[str, LinearTokens]:
        return {name: LinearTokens(metric) for name, metric in metrics[stream.source].items()}

    def add(sums: Mapping[str, LinearMoments] | Mapping[str, LinearTokens], seen: Seen) -> None:
        x, wanted = flat(seen.merged.inputs[first.name]), targets(seen)
        weight = token_weights([own for own, _ in wanted.values()], seen.sequences, seen.counted)
        own, rows = sums[first.name], _ALL
        if isinstance(own, LinearMoments):
            own.inputs.add(x, weight)  # shared by the units
        elif every[seen.source] > 1 or seen.counted is not None:
            length = len(weight) // seen.sequences
            rows = judging_rows(seen.numbers, length, every[seen.source]).to(x.device)
            rows = rows if seen.counted is None else rows[seen.counted[rows]]
            x, weight = x[rows], weight[rows]
        for name, (goal, made) in wanted.items():
            output = flat(made)[rows]
            sums[name].add(x, output if goal is made else flat(goal)[rows], output, weight)

    outs = [out for out, _ in shapes.values()]
    size = kept_bytes(columns, outs, len(walk.streams), dtype)
    apart = bool(walk.metrics)
    return gather(
        walk,
        group,
        units,
        empty=empty,
        judges=judges,
        add=add,
        pool=not apart,
        on_host=apart and not may_stay(size, memory_of(walk.device)),
    )


def fit_norms(walk: Walk, group: int, units: list[Unit]) -> Settled:
    """Fit the one norm of a group."""
    (unit,) = units
    module = walk.part.root.get_submodule(unit.name)
    own = {p: walk.weights[unit.parameter(p)] for p in unit.parameters}
    features = own["weight"].shape[0]

    def empty(_: Stream) -> dict[str, FeatureMoments]:
        return {unit.name: FeatureMoments.zeros(features, walk.device)}

    def add(sums: Mapping[str, FeatureMoments], seen: Seen) -> None:
        _, normalised = norm_parts(module, seen.merged.inputs[unit.name], own)
        wanted = target(walk, unit, seen)
        weight = token_weights([wanted], seen.sequences, seen.counted)
        scaled = wanted - unit.unit_gain * normalised
        output = seen.teacher.outputs[unit.name]
        sums[unit.name].add(flat(normalised), flat(scaled), flat(output), weight)

    evidence = gather(walk, group, units, empty=empty, judges=empty, add=add, pool=True)[unit.name]
    yield from _named(walk, unit, fit_norm(walk.weight_to_fit(unit), walk.bias(unit), evidence))


def fit_embeddings(walk: Walk, group: int, units: list[Unit]) -> Settled:
    """Fit an embedding to the rows that each model's data looks up."""
    (unit,) = units
    embedding = walk.weight_to_fit(unit)
    rows = embedding.tensors[0].shape[0]

    def count(stream: Stream, split: Split) -> Tensor:
        counts = torch.zeros(rows, dtype=torch.float64, device=walk.device)
        for chunk, _, tokens in walk.pairs(stream, split):
            seen = walk.part.captured(walk.weights, tokens, inputs=(unit.name,))
            # Position ids are looked up once for all sequences of a chunk.
            ids = seen.inputs[unit.name].expand(tokens.shape[0], -1)
            ids, counted = ids.reshape(-1), stream.judging(chunk)
            ids = ids if counted is None else ids[counted.to(ids.device)]
            counts += torch.bincount(ids, minlength=rows)
        return all_sum(counts)

    usage = []
    for stream in walk.streams:
        fit = count(stream, "fit")
        held_out = count(stream, "held_out") if stream.share.held_out else fit
        usage.append(Usage(stream.source, fit, held_out))
    yield from _named(walk, unit, [fit_embedding(embedding, usage)])


FITS = {
    "linear": fit_linears,
    "norm": fit_norms,
    "embedding": fit_embeddings,
    "router": fit_routers,
    "experts": fit_experts,
}


def _named(walk: Walk, unit: Unit, fitted: list[FittedTensor]) -> Settled:
    """The fitted tensors by name, with their sources where they are kept."""
    for parameter, tensor in zip(("weight", "bias"), fitted, strict=False):
        name = unit.parameter(parameter)
        yield name, replace(tensor, sources=walk.sources[name])


def _out_in(walk: Walk, unit: Unit) -> tuple[int, int]:
    rows, columns = walk.weight(unit).tensors[0].shape
    return (columns, rows) if unit.axis == 0 else (rows, columns)
