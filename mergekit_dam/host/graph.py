"""From mergekit's planned tensors to the tasks of a dam merge.

1. Every planned tensor is placed: input, a block, or output of the decoder, or outside of it.
2. Headers are checked: every source has every tensor, in one shape.
3. Tensors of a place become a stage. One sweep of layer fits is a chain of stages, written as
   it goes; a search goes through the stages as often as it needs to, and is followed by a sweep
   that writes; a replay needs no stages.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorSpec
from mergekit_dam.host.artifacts import write_artifacts
from mergekit_dam.host.checks import check_complete, check_headers, check_shapes, refuse_outside
from mergekit_dam.host.initial import averages, check_start, copies, saved_record, search_start
from mergekit_dam.host.places import place_tensors
from mergekit_dam.host.specs import tensor_spec
from mergekit_dam.host.stages import PlannedStage, calibration_streams, planned_stages
from mergekit_dam.host.tasks import (
    FitStage,
    Known,
    MergedTensor,
    MergeKnown,
    Piece,
    Search,
    SearchNode,
    StageNode,
    WriteArtifacts,
)
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.parameters import RunParameters
from mergekit_dam.request.prepare import Prepared
from mergekit_dam.sources.decoders import source_decoders
from mergekit_dam.sources.fused import Region, fuse_experts
from mergekit_dam.sources.headers import WeightTask
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.readahead import spans_of
from mergekit_dam.sources.stage import Models
from mergekit_dam.streams.memory import limit_gpu
from mergekit_dam.streams.stream import Stream


@dataclass(frozen=True)
class Graph:
    """Tasks in place of mergekit's, and one more that writes coefficients and report."""

    tensors: list[tuple[WeightInfo, Task[Any]]]
    artifacts: WriteArtifacts


def build_graph(
    planned: Sequence[WeightTask],
    prepared: Prepared,
    *,
    config: PretrainedConfig,
    options: MergeOptions,
    out_dtype: str | None,
    parameters: Mapping[str, Any],
    out_path: Path,
    teaching: Mapping[str, frozenset[ModelReference]],
    stacks: Mapping[ModelReference, Sequence[int]],
) -> Graph:
    """Rewrite mergekit's plan of single tensors into stages.

    Args:
        planned: mergekit's tensors, each with the task that would merge it.
        config: of the merged model.
        out_dtype: name of the dtype that tensors are written in, if it is not the sources'.
        parameters: of the configuration, for the provenance.
        out_path: where the merged model goes.
        teaching: by output tensor, the models that are read for it and not merged.
        stacks: which of its layers every model has at each layer of the merged model.

    Raises:
        ArchitectureError: the model cannot be cut into blocks, or a tensor is missing.
        ConfigError: coefficients to replay do not fit the models.
    """
    order = tuple(dict.fromkeys(model for _, task in planned for model in task.model_order))
    shapes = check_headers(planned, order)
    artifacts = partial(
        write_artifacts, prepared, order, options.trust_remote_code, parameters, out_path
    )
    output = None
    if prepared.replay is not None:
        needed: Collection[str] = prepared.replay.coefficients.keys()
    elif prepared.checked.learns:
        output = _decoder(config, options)
        needed = [name for name, _ in output.model.named_parameters()]
    else:
        needed = ()
    own = {weight.name if output is None else output.in_model(weight.name) for weight, _ in planned}
    missing = set(needed) - own
    asked = [weight for weight, _ in planned]
    planned, regions = fuse_experts(planned, missing, config.model_type)
    if regions:
        whole = {r.whole: teaching.get(name, frozenset()) for name, r in regions.items()}
        teaching = {**teaching, **whole}
        shapes = check_headers(planned, order)
    specs = [
        tensor_spec(weight, task, order, prepared, out_dtype, teaching.get(weight.name, ()))
        for weight, task in planned
    ]
    if output is None:
        if prepared.replay is not None:
            known = saved_record(prepared.replay, specs, order, shapes)
        else:
            known = copies(specs)
            if len(order) > 1:
                check_shapes(_decoder(config, options), shapes)
        tasks: dict[str, Task[Any]] = {
            spec.name: _known(spec, task.gather_tensors, order, known)
            for (_, task), spec in zip(planned, specs, strict=True)
        }
        return Graph(
            _as_asked(asked, tasks, regions),
            WriteArtifacts(last=None, write=artifacts, record=known),
        )
    models = Models(
        output,
        source_decoders(output, order, options, stacks),
        order,
        prepared.run,
        unknown=_unknown(prepared, order),
    )
    placed = place_tensors(planned, specs, output)
    for decoder in (output, *models.sources):
        check_complete(decoder, placed)
    check_shapes(output, shapes)
    if prepared.run.other_weights == "error":
        refuse_outside(placed)
    stages = planned_stages(placed, models)
    device = torch.device(options.device or "cpu")
    limit_gpu(device, prepared.run.gpu_memory)
    hidden = output.config.get_text_config().hidden_size
    streams = partial(calibration_streams, prepared, order, hidden, device, out_path)
    outside = averages(placed)
    last: FitStage | Search
    if prepared.run.one_sweep:
        tasks, last = _chain(stages, streams, outside)
    else:
        saved = None
        if prepared.start is not None:
            saved = saved_record(prepared.start, specs, order, shapes)
        start = search_start([own.stage for own in stages], prepared.run, outside, saved)
        check_start(specs, start, prepared.run)
        tasks, last = _search(stages, streams, prepared.run, start, options, out_path)
    tasks |= {
        tensor.spec.name: _known(tensor.spec, tensor.gather, order, outside)
        for tensor in placed
        if tensor.kind == "outside"
    }
    return Graph(_as_asked(asked, tasks, regions), WriteArtifacts(last=last, write=artifacts))


def _as_asked(
    asked: Sequence[WeightInfo], tasks: Mapping[str, Task[Any]], regions: Mapping[str, Region]
) -> list[tuple[WeightInfo, Task[Any]]]:
    """The tensors that mergekit planned, those that were fused cut out of the merged ones."""
    found: list[tuple[WeightInfo, Task[Any]]] = []
    for weight in asked:
        region = regions.get(weight.name)
        if region is None:
            found.append((weight, tasks[weight.name]))
        else:
            found.append((weight, Piece(whole=tasks[region.whole], region=region)))
    return found


def _unknown(prepared: Prepared, order: Sequence[ModelReference]) -> dict[int, torch.Tensor]:
    """Of every source, the tokens that it does not have, if there are any."""
    if prepared.vocabulary is None:
        return {}
    found = {source: prepared.vocabulary.unknown_to(model) for source, model in enumerate(order)}
    return {source: tokens for source, tokens in found.items() if tokens is not None}


def _decoder(config: PretrainedConfig, options: MergeOptions) -> Decoder:
    """The merged model's."""
    return Decoder(config, torch.device("cpu"), trust_remote_code=options.trust_remote_code)


def _chain(
    stages: Sequence[PlannedStage], streams: Callable[[], list[Stream]], outside: MergeRecord
) -> tuple[dict[str, Task[Any]], FitStage]:
    """One sweep, every stage behind the one before; tensors are written as they are fitted."""
    tasks: dict[str, Task[Any]] = {}
    previous: FitStage | None = None
    for planned in stages:
        stage = planned.stage
        own = len(stage.tensors)
        node = StageNode(
            dataclasses.replace(stage, borrowed=()),
            planned.label,
            planned.gathers[:own],
            previous,
            streams,
            outside,
        )
        if previous is not None:
            previous.node.ahead = spans_of(node.inputs)
        previous = FitStage(node=node)
        for spec in stage.tensors:
            tasks[spec.name] = MergedTensor(fit=previous, name=spec.name)
    assert previous is not None
    return tasks, previous


def _search(
    stages: Sequence[PlannedStage],
    streams: Callable[[], list[Stream]],
    settings: RunParameters,
    start: MergeRecord,
    options: MergeOptions,
    out_path: Path,
) -> tuple[dict[str, Task[Any]], Search]:
    """All sweeps in one task; when the best coefficients are known, tensors are merged."""
    network = Network(
        [planned.stage for planned in stages],
        [planned.gathers for planned in stages],
        torch.device(options.device or "cpu"),
        settings.resident,
    )
    fit = Search(node=SearchNode(network, streams, settings, start, out_path))
    tasks: dict[str, Task[Any]] = {}
    for planned in stages:
        stage = planned.stage
        for spec, gather in zip(stage.tensors, planned.gathers, strict=False):
            tasks[spec.name] = MergeKnown(known=Known(spec, gather, stage.models.order), fit=fit)
    return tasks, fit


def _known(
    spec: TensorSpec, gather: Task[Any], order: tuple[ModelReference, ...], record: MergeRecord
) -> MergeKnown:
    return MergeKnown(known=Known(spec, gather, order, record))
