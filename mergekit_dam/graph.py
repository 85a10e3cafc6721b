"""From mergekit's planned tensors to the tasks of a dam merge.

1. Every planned tensor is placed: input, a block, or output of the decoder, or outside of it.
2. Headers are checked: every source has every tensor, in one shape.
3. Tensors of a place become a stage. One sweep of layer fits is a chain of stages, written as
   it goes; a search goes through the stages as often as it needs to, and is followed by a sweep
   that writes; a replay needs no stages.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from transformers import PretrainedConfig

from mergekit_dam.artifacts import write_artifacts
from mergekit_dam.coefficients import Parametrisation
from mergekit_dam.decoder import Decoder
from mergekit_dam.errors import ConfigError
from mergekit_dam.fitting.storage import choose_storage
from mergekit_dam.fitting.streams import Stream
from mergekit_dam.fitting.tensors import TensorReport
from mergekit_dam.headers import check_headers
from mergekit_dam.loadable import Planned, fused
from mergekit_dam.network import Network
from mergekit_dam.objective.nonlinearity import invert
from mergekit_dam.places import (
    Place,
    check_complete,
    place_tensors,
    refuse_outside,
    source_decoders,
)
from mergekit_dam.prepare import Prepared
from mergekit_dam.readahead import spans_of
from mergekit_dam.replay import saved_record
from mergekit_dam.settings import RunSettings, TensorSettings
from mergekit_dam.skeleton import WeightNames, build_model
from mergekit_dam.stage import Models, Record, Stage, StageKind, TensorPlan
from mergekit_dam.tasks import (
    FitStage,
    Known,
    MergedTensor,
    MergeKnown,
    Search,
    SearchNode,
    StageGather,
    StageNode,
    WriteArtifacts,
)


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
) -> Graph:
    """Rewrite mergekit's plan of single tensors into stages.

    Args:
        planned: mergekit's tensors, each with the task that would merge it.
        config: of the merged model.
        out_dtype: name of the dtype that tensors are written in, if it is not the sources'.
        parameters: of the configuration, for the provenance.
        out_path: where the merged model goes.

    Raises:
        ArchitectureError: the model cannot be cut into blocks, or a tensor is missing.
        ConfigError: coefficients to replay do not fit the models.
    """
    order = tuple(planned[0][1].model_order)
    output = None
    if prepared.replay is None:
        output = Decoder(config, torch.device("cpu"), trust_remote_code=options.trust_remote_code)
        planned = fused(planned, output.names)
    elif prepared.replay.coefficients.keys() != {weight.name for weight, _ in planned}:
        model = build_model(config, trust_remote_code=options.trust_remote_code)
        planned = fused(planned, WeightNames.of(model))
    shapes = check_headers(planned, order)
    artifacts = partial(
        write_artifacts, prepared, order, options.trust_remote_code, parameters, out_path
    )
    plans = [_tensor_plan(weight, task, order, prepared, out_dtype) for weight, task in planned]
    if output is None:
        assert prepared.replay is not None
        known = saved_record(prepared.replay, plans, order, shapes)
        tensors: list[tuple[WeightInfo, Task[Any]]] = [
            (weight, _known(plan, task.gather_tensors, order, known))
            for (weight, task), plan in zip(planned, plans, strict=True)
        ]
        return Graph(tensors, WriteArtifacts(last=None, write=artifacts, record=known))
    models = Models(output, source_decoders(output, order, options), order, prepared.settings)
    places = place_tensors(planned, plans, output)
    for decoder in (output, *models.sources):
        check_complete(decoder, places)
    if prepared.checked.run.other_weights == "error":
        refuse_outside(places)
    stages = _stages(places, models)
    device = torch.device(options.device or "cpu")
    hidden = output.config.get_text_config().hidden_size
    streams = partial(_streams, prepared, order, hidden, device, out_path)
    averages = _averages(places, order)
    last: FitStage | Search
    if prepared.settings.one_sweep:
        tasks, last = _chain(stages, streams, averages)
    else:
        saved = None
        if prepared.start is not None:
            saved = saved_record(prepared.start, plans, order, shapes)
        start = _start(stages, prepared.settings, averages, saved)
        _check_start(plans, start, prepared.settings)
        tasks, last = _search(stages, streams, prepared.settings, start, options, out_path)
    tasks |= {
        place.plan.name: _known(place.plan, place.gather, order, averages)
        for place in places
        if place.kind == "outside"
    }
    return Graph(
        [(weight, tasks[weight.name]) for weight, _ in planned],
        WriteArtifacts(last=last, write=artifacts),
    )


def _tensor_plan(
    weight: WeightInfo,
    task: ExecuteMergeMethodTask,
    order: Sequence[ModelReference],
    prepared: Prepared,
    out_dtype: str | None,
) -> TensorPlan:
    """How one tensor is fitted; `order` is that of the first slice, and others may differ."""
    shared = task.parameters
    base = order.index(task.base_model) if task.base_model in order else None
    own = [task.input_parameters[model] for model in order]
    include_base = prepared.checked.run.include_base
    weights = [parameters["weight"] for parameters in own]
    if not sum(w for i, w in enumerate(weights) if i != base or include_base):
        raise ConfigError(
            [f"{weight.name}: every model has `weight: 0`; the average to start from needs one"]
        )
    calibrated = [task.input_parameters[model]["loss_weight"] for model in prepared.calibration]
    if prepared.replay is None and not sum(calibrated):
        raise ConfigError(
            [f"{weight.name}: every model has `loss_weight: 0`; at least one must count in the fit"]
        )
    settings = TensorSettings(
        parametrisation=_parametrisation(tuple(weights), base, include_base, shared["sum_to_one"]),
        loss_weights=tuple(parameters["loss_weight"] for parameters in own),
        ridge=shared["ridge"],
        granularity=shared["granularity"],
        embeddings=shared["embeddings"],
        norms=shared["norms"],
        head=shared["head"],
    )
    written = dtype_from_name(weight.force_dtype or out_dtype)
    return TensorPlan(weight.name, settings, written)


@lru_cache(maxsize=64)
def _parametrisation(
    weights: tuple[float, ...], base: int | None, include_base: bool, sum_to_one: bool
) -> Parametrisation:
    """One for all tensors that are asked for alike, so that none grows with the layers."""
    return Parametrisation.create(
        weights, base=base, include_base=include_base, sum_to_one=sum_to_one
    )


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


def _averages(places: Sequence[Place], order: Sequence[ModelReference]) -> Record:
    """The weights outside of the decoder: averaged, whatever is fitted."""
    record = Record()
    for place in places:
        if place.kind == "outside":
            name = place.plan.name
            record.coefficients[name] = place.plan.settings.parametrisation.starting_coefficients()
            record.reports[name] = TensorReport(name, "other", "averaged: outside of the decoder")
    return record


def _chain(
    stages: Sequence[PlannedStage], streams: Callable[[], list[Stream]], averages: Record
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
            averages,
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


def _start(
    stages: Sequence[PlannedStage], settings: RunSettings, averages: Record, saved: Record | None
) -> Record:
    """The coefficients that a search starts from."""
    if saved is not None:
        return saved
    generator = torch.Generator().manual_seed(settings.seed)
    record = dataclasses.replace(averages, coefficients=dict(averages.coefficients))
    record.reports = dict(averages.reports)
    for plan in (plan for planned in stages for plan in planned.stage.tensors):
        form = plan.settings.parametrisation
        if settings.start == "random":
            rows = form.random_coefficients(generator)
        else:
            rows = form.starting_coefficients()
        record.coefficients[plan.name] = rows
        record.reports[plan.name] = TensorReport(plan.name, "other", "start kept")
    for planned in stages:
        for plan in planned.stage.tensors:
            if plan.tied_to is not None:
                record.coefficients[plan.name] = record.coefficients[plan.tied_to]
    return record


def _check_start(plans: Sequence[TensorPlan], start: Record, settings: RunSettings) -> None:
    """Refuse a start that the descent cannot begin at.

    Raises:
        ConfigError: the start's coefficients are of another form than those that are fitted.
    """
    if settings.objective == "layer":
        return
    for plan in plans:
        coefficients = start.coefficients[plan.name]
        if plan.settings.granularity == "tensor" and coefficients.shape[1] > 1:
            raise ConfigError(
                [
                    f"start: the file has one coefficient a column for {plan.name}, but "
                    f"`granularity` is `tensor`; set `granularity: column`, or another start"
                ]
            )
        try:
            form = plan.settings.parametrisation
            invert(settings.logits.nonlinearity, form.unknowns(coefficients))
        except ConfigError as error:
            raise ConfigError([f"{plan.name}: {problem}" for problem in error.problems]) from None


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
        return task.model_copy(update={"gather_tensors": _labelled(task.gather_tensors, label)})
    return StageGather(**dict(task), label=label)
