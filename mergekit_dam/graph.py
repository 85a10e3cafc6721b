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
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from transformers import PretrainedConfig

from mergekit_dam.artifacts import write_artifacts
from mergekit_dam.decoder import Decoder
from mergekit_dam.fitting.storage import choose_storage
from mergekit_dam.fitting.streams import Stream
from mergekit_dam.fused import Region, fuse_experts
from mergekit_dam.headers import check_headers
from mergekit_dam.memory import limit_gpu
from mergekit_dam.network import Network
from mergekit_dam.places import (
    Place,
    Planned,
    check_complete,
    check_shapes,
    place_tensors,
    refuse_outside,
    source_decoders,
)
from mergekit_dam.prepare import Prepared
from mergekit_dam.readahead import spans_of
from mergekit_dam.replay import saved_record
from mergekit_dam.settings import RunSettings
from mergekit_dam.stage import Models, Record, Stage, StageKind, TensorPlan
from mergekit_dam.starts import averages, check_start, copies, search_start
from mergekit_dam.tasks import (
    FitStage,
    Known,
    MergedTensor,
    MergeKnown,
    Piece,
    Search,
    SearchNode,
    StageGather,
    StageNode,
    TeachersVocabulary,
    WriteArtifacts,
)
from mergekit_dam.tensor_plans import tensor_plan


@dataclass(frozen=True)
class Graph:
    """Tasks in place of mergekit's, and one more that writes coefficients and report."""

    tensors: list[tuple[WeightInfo, Task[Any]]]
    artifacts: WriteArtifacts


def build_graph(
    planned: Sequence[Planned],
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
    plans = [
        tensor_plan(weight, task, order, prepared, out_dtype, teaching.get(weight.name, ()))
        for weight, task in planned
    ]
    if output is None:
        if prepared.replay is not None:
            known = saved_record(prepared.replay, plans, order, shapes)
        else:
            known = copies(plans)
            if len(order) > 1:
                check_shapes(_decoder(config, options), shapes)
        tasks: dict[str, Task[Any]] = {
            plan.name: _known(plan, task.gather_tensors, order, known)
            for (_, task), plan in zip(planned, plans, strict=True)
        }
        return Graph(
            _as_asked(asked, tasks, regions),
            WriteArtifacts(last=None, write=artifacts, record=known),
        )
    models = Models(
        output,
        source_decoders(output, order, options, stacks),
        order,
        prepared.settings,
        unknown=_unknown(prepared, order),
    )
    places = place_tensors(planned, plans, output)
    for decoder in (output, *models.sources):
        check_complete(decoder, places)
    check_shapes(output, shapes)
    if prepared.checked.run.other_weights == "error":
        refuse_outside(places)
    stages = _stages(places, models)
    device = torch.device(options.device or "cpu")
    limit_gpu(device, prepared.settings.gpu_memory)
    hidden = output.config.get_text_config().hidden_size
    streams = partial(_streams, prepared, order, hidden, device, out_path)
    outside = averages(places)
    last: FitStage | Search
    if prepared.settings.one_sweep:
        tasks, last = _chain(stages, streams, outside)
    else:
        saved = None
        if prepared.start is not None:
            saved = saved_record(prepared.start, plans, order, shapes)
        start = search_start([own.stage for own in stages], prepared.settings, outside, saved)
        check_start(plans, start, prepared.settings)
        tasks, last = _search(stages, streams, prepared.settings, start, options, out_path)
    tasks |= {
        place.plan.name: _known(place.plan, place.gather, order, outside)
        for place in places
        if place.kind == "outside"
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


@dataclass(frozen=True)
class PlannedStage:
    """A stage, and the tasks that bring its tensors.

    Attributes:
        label: orders the stages among the tasks.
        gathers: one task an output tensor, in the order of the stage; then those it borrows.
    """

    stage: Stage
    label: str
    gathers: tuple[Task[Any], ...]


def _stages(places: Sequence[Place], models: Models) -> list[PlannedStage]:
    """Stages in the order the data passes them."""
    kinds: list[tuple[StageKind, int]] = [("input", 0)]
    kinds += [("block", index) for index in range(len(models.output.blocks))]
    kinds += [("output", 0)]
    tied = _tied_head(places, models.output)
    stages = []
    for number, (kind, index) in enumerate(kinds):
        own = [place for place in places if (place.kind, place.index) == (kind, index)]
        borrowed = [tied] if kind == "output" and tied is not None else []
        label = f"dam {number:05d}"
        stages.append(
            PlannedStage(
                Stage(
                    models,
                    kind,
                    index,
                    [place.plan for place in own],
                    [place.plan for place in borrowed],
                ),
                label,
                tuple(_labelled(place.gather, label) for place in [*own, *borrowed]),
            )
        )
    return stages


def _tied_head(places: Sequence[Place], decoder: Decoder) -> Place | None:
    """The tensor of the input that the head is tied to."""
    name = decoder.canonical(f"{decoder.head_name}.weight")
    return next((p for p in places if p.kind == "input" and p.plan.in_model == name), None)


def _chain(
    stages: Sequence[PlannedStage], streams: Callable[[], list[Stream]], outside: Record
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
        for plan in stage.tensors:
            tasks[plan.name] = MergedTensor(fit=previous, name=plan.name)
    assert previous is not None
    return tasks, previous


def _search(
    stages: Sequence[PlannedStage],
    streams: Callable[[], list[Stream]],
    settings: RunSettings,
    start: Record,
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
        for plan, gather in zip(stage.tensors, planned.gathers, strict=False):
            tasks[plan.name] = MergeKnown(known=Known(plan, gather, stage.models.order), fit=fit)
    return tasks, fit


def _known(
    plan: TensorPlan, gather: Task[Any], order: tuple[ModelReference, ...], record: Record
) -> MergeKnown:
    return MergeKnown(known=Known(plan, gather, order, record))


def _streams(
    prepared: Prepared,
    order: Sequence[ModelReference],
    hidden: int,
    device: torch.device,
    out_path: Path,
) -> list[Stream]:
    """This process's share of the calibration tokens of every model that has some.

    Args:
        hidden: size of a hidden state.
        out_path: where streams are kept that are kept on disk.
    """
    # Two streams a model, in fp32, and room for what leaves a part while it is still entered.
    tokens = sum(calibration.tokens.numel() for calibration in prepared.calibration.values())
    size = 4 * hidden * 3 * tokens
    storage = choose_storage(prepared.settings.stream_offload, size, device, out_path)
    return [
        Stream.of_tokens(
            order.index(model),
            calibration.tokens,
            prepared.settings.held_out(calibration.tokens.shape[0]),
            storage,
            turn=turn,
        )
        for turn, (model, calibration) in enumerate(prepared.calibration.items())
    ]


def _labelled(task: Task[Any], label: str) -> Task[Any]:
    """The same gather, vocabulary adapters included, scheduled with its stage."""
    if isinstance(task, (PermutedVocabulary, TruncatedVocabulary)):
        inner = _labelled(task.gather_tensors, label)
        if isinstance(task, PermutedVocabulary) and _forces(task):
            return TeachersVocabulary.model_construct(**{**dict(task), "gather_tensors": inner})
        return task.model_copy(update={"gather_tensors": inner})
    return StageGather(**dict(task), label=label)


def _forces(task: PermutedVocabulary) -> bool:
    """Whether some tokens get other rows than those that models have for them."""
    return task.tokens is not None and any(task.tokens[token].force for token in task.tokens)
