"""From mergekit's planned tensors to the tasks of a dam merge.

1. Every planned tensor is placed: input, a block, or output of the decoder, or outside of it.
2. Headers are checked: every source has every tensor, in one shape.
3. Tensors of a place become a stage, and stages a chain; a replay needs no chain.
"""

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
from mergekit_dam.coefficients import CoefficientFile, Parametrisation
from mergekit_dam.decoder import Decoder
from mergekit_dam.errors import ConfigError
from mergekit_dam.fitting.streams import Stream
from mergekit_dam.fitting.tensors import TensorReport
from mergekit_dam.headers import check_headers
from mergekit_dam.places import Place, Planned, check_complete, place_tensors, source_decoders
from mergekit_dam.prepare import Prepared
from mergekit_dam.settings import TensorSettings
from mergekit_dam.stage import Models, Record, Stage, StageKind, TensorPlan
from mergekit_dam.tasks import (
    FitStage,
    KnownCoefficients,
    MergedTensor,
    MergeKnown,
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
    shapes = check_headers(planned, order)
    artifacts = partial(
        write_artifacts, prepared, order, options.trust_remote_code, parameters, out_path
    )
    plans = [_tensor_plan(weight, task, order, prepared, out_dtype) for weight, task in planned]
    if prepared.replay is not None:
        tensors, record = _replay(planned, plans, order, prepared.replay, shapes)
        return Graph(tensors, WriteArtifacts(last=None, write=artifacts, record=record))
    output = Decoder(config, torch.device("cpu"), trust_remote_code=options.trust_remote_code)
    models = Models(output, source_decoders(output, order, options), order, prepared.settings)
    places = place_tensors(planned, plans, output)
    for decoder in (output, *models.sources):
        check_complete(decoder, places)
    return _chain(planned, places, models, prepared, artifacts)


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


def _chain(
    planned: Sequence[Planned],
    places: Sequence[Place],
    models: Models,
    prepared: Prepared,
    artifacts: Callable[[Record], None],
) -> Graph:
    """Stages in the order the data passes them, each behind the one before."""
    stages: list[tuple[StageKind, int]] = [("input", 0)]
    stages += [("block", index) for index in range(len(models.output.blocks))]
    stages += [("output", 0)]
    record = Record()
    tasks: dict[str, Task[Any]] = {}
    for place in places:
        if place.kind == "outside":
            task, start = _average(place, models.order)
            tasks[place.plan.name] = task
            record.coefficients[place.plan.name] = start
            record.reports[place.plan.name] = TensorReport(
                place.plan.name, "other", "averaged: outside of the decoder"
            )
    previous: FitStage | None = None
    for number, (kind, index) in enumerate(stages):
        own = [place for place in places if (place.kind, place.index) == (kind, index)]
        label = f"dam {number:05d}"
        node = StageNode(
            stage=Stage(models, kind, index, [place.plan for place in own]),
            label=label,
            inputs=tuple(_labelled(place.gather, label) for place in own),
            previous=previous,
            streams=partial(_streams, prepared, models.order),
            record=record,
        )
        previous = FitStage(node=node)
        for place in own:
            tasks[place.plan.name] = MergedTensor(fit=previous, name=place.plan.name)
    return Graph(
        [(weight, tasks[weight.name]) for weight, _ in planned],
        WriteArtifacts(last=previous, write=artifacts),
    )


def _streams(prepared: Prepared, order: Sequence[ModelReference]) -> list[Stream]:
    """The calibration tokens of every model that has some, at the entrance of the model."""
    return [
        Stream.of_tokens(
            order.index(model),
            calibration.tokens,
            prepared.settings.held_out(calibration.tokens.shape[0]),
        )
        for model, calibration in prepared.calibration.items()
    ]


def _labelled(task: Task[Any], label: str) -> Task[Any]:
    """The same gather, vocabulary adapters included, scheduled with its stage."""
    if isinstance(task, (PermutedVocabulary, TruncatedVocabulary)):
        return task.model_copy(update={"gather_tensors": _labelled(task.gather_tensors, label)})
    return StageGather(**dict(task), label=label)


def _average(place: Place, order: tuple[ModelReference, ...]) -> tuple[MergeKnown, torch.Tensor]:
    start = place.plan.settings.parametrisation.starting_coefficients()
    known = KnownCoefficients(place.plan, place.gather, order, start, -1)
    return MergeKnown(known=known), start


def _replay(
    planned: Sequence[Planned],
    plans: Sequence[TensorPlan],
    order: tuple[ModelReference, ...],
    saved: CoefficientFile,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[list[tuple[WeightInfo, Task[Any]]], Record]:
    """Merge every tensor with the coefficients of an earlier merge."""
    rows = saved.rows_of([str(model) for model in order])
    axes = saved.metadata.get("axes", {})
    names = [plan.name for plan in plans]
    problems = [
        *(f"none for {name}" for name in names if name not in saved.coefficients),
        *(f"some for {name}, which is not merged" for name in saved.coefficients.keys() - names),
    ]
    for name in saved.coefficients.keys() & shapes.keys():
        columns, shape = saved.coefficients[name].shape[1], shapes[name]
        if columns not in (1, shape[axes.get(name, -1)] if shape else 1):
            problems.append(f"{columns} a model for {name}, of shape {list(shape)}")
    if problems:
        raise ConfigError(
            [
                f"coefficients: the file has {', '.join(sorted(problems)[:3])}"
                f"{' and so on' if len(problems) > 3 else ''}; it belongs to another model or "
                f"another choice of layers"
            ]
        )
    tensors: list[tuple[WeightInfo, Task[Any]]] = []
    record = Record()
    for (weight, task), plan in zip(planned, plans, strict=True):
        coefficients = saved.coefficients[plan.name][rows]
        axis = axes.get(plan.name, -1)
        known = KnownCoefficients(plan, task.gather_tensors, order, coefficients, axis)
        tensors.append((weight, MergeKnown(known=known)))
        record.coefficients[plan.name] = coefficients
        record.reports[plan.name] = TensorReport(plan.name, "replay", "replayed")
        if axis != -1:
            record.axes[plan.name] = axis
    return tensors, record
