"""From mergekit's planned tensors to the tasks of a dam merge.

1. Every planned tensor is placed: input, a block, or output of the decoder, or outside of it.
2. Headers are checked: every source has every tensor, in one shape.
3. Tensors of a place become a stage, and stages a chain; a replay needs no chain.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from transformers import PretrainedConfig

from mergekit_dam import report
from mergekit_dam.coefficients import FILE_NAME, CoefficientFile, Parametrisation
from mergekit_dam.decoder import Decoder
from mergekit_dam.errors import ArchitectureError, ConfigError
from mergekit_dam.fitting.streams import Stream
from mergekit_dam.fitting.tensors import TensorReport
from mergekit_dam.headers import check_headers
from mergekit_dam.prepare import Prepared
from mergekit_dam.settings import TensorSettings
from mergekit_dam.stage import Models, Record, Stage, TensorPlan
from mergekit_dam.tasks import (
    FitStage,
    KnownCoefficients,
    MergedTensor,
    MergeKnown,
    StageGather,
    StageNode,
    WriteArtifacts,
)

Planned = tuple[WeightInfo, ExecuteMergeMethodTask]


@dataclass(frozen=True)
class Graph:
    """Tasks in place of mergekit's, and one more that writes coefficients and report."""

    tensors: list[tuple[WeightInfo, Task]]
    artifacts: WriteArtifacts


@dataclass(frozen=True)
class _Place:
    """Where a tensor acts: stage kind, index of the block, and its own plan and inputs."""

    kind: str
    index: int
    plan: TensorPlan
    gather: Task


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
    check_headers(planned, order)
    artifacts = partial(
        write_artifacts, prepared, order, options.trust_remote_code, parameters, out_path
    )
    plans = [_tensor_plan(weight, task, prepared, out_dtype) for weight, task in planned]
    if prepared.replay is not None:
        tensors, record = _replay(planned, plans, order, prepared.replay)
        return Graph(tensors, WriteArtifacts(last=None, write=artifacts, record=record))
    output = Decoder(config, torch.device("cpu"), trust_remote_code=options.trust_remote_code)
    models = Models(output, _source_decoders(output, order, options), order, prepared.settings)
    places = _place(planned, plans, output)
    _check_complete(output, places)
    return _chain(planned, places, models, prepared, artifacts)


def _tensor_plan(
    weight: WeightInfo, task: ExecuteMergeMethodTask, prepared: Prepared, out_dtype: str | None
) -> TensorPlan:
    shared, order = task.parameters, task.model_order
    base = order.index(task.base_model) if task.base_model in order else None
    own = [task.input_parameters[model] for model in order]
    include_base = prepared.checked.run.include_base
    weights = [parameters["weight"] for parameters in own]
    if not sum(w for i, w in enumerate(weights) if i != base or include_base):
        raise ConfigError(
            [f"{weight.name}: every model has `weight: 0`; the average to start from needs one"]
        )
    settings = TensorSettings(
        parametrisation=Parametrisation.create(
            weights, base=base, include_base=include_base, sum_to_one=shared["sum_to_one"]
        ),
        loss_weights=tuple(parameters["loss_weight"] for parameters in own),
        ridge=shared["ridge"],
        granularity=shared["granularity"],
        embeddings=shared["embeddings"],
        norms=shared["norms"],
        head=shared["head"],
    )
    written = dtype_from_name(weight.force_dtype or out_dtype)
    return TensorPlan(weight.name, settings, written)


def _source_decoders(
    output: Decoder, order: Sequence[ModelReference], options: MergeOptions
) -> tuple[Decoder, ...]:
    """Every source's decoder; the merged model's own wherever the forward pass is the same."""
    decoders = {_forward_key(output.config): output}
    found = []
    for model in order:
        config = model.config(trust_remote_code=options.trust_remote_code)
        layers = config.get_text_config().num_hidden_layers
        # With slices a source's stack of layers is the merged model's.
        key = _forward_key(config) if layers == len(output.blocks) else _forward_key(output.config)
        if key not in decoders:
            decoders[key] = Decoder(
                config, torch.device("cpu"), trust_remote_code=options.trust_remote_code
            )
        found.append(decoders[key])
    return tuple(found)


_NOT_OF_THE_FORWARD = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "vocab_size",
)


def _forward_key(config: PretrainedConfig) -> str:
    """Equal for configurations whose blocks compute the same from the same weights."""
    values = config.to_dict()
    return str(sorted((k, str(v)) for k, v in values.items() if k not in _NOT_OF_THE_FORWARD))


def _place(
    planned: Sequence[Planned], plans: Sequence[TensorPlan], decoder: Decoder
) -> list[_Place]:
    """Where every planned tensor acts in the decoder."""
    names = frozenset(plan.name for plan in plans)
    parts = decoder.part_of(frozenset(n for n in names if decoder.block_of(n) is None))
    places = []
    for (_, task), plan in zip(planned, plans, strict=True):
        gather, canonical = task.gather_tensors, decoder.canonical(plan.name)
        block = decoder.block_of(plan.name) if canonical is not None else None
        if canonical is None:
            places.append(_Place("outside", 0, plan, gather))
        elif canonical != plan.name and canonical in names:
            tied = dataclasses.replace(plan, tied_to=canonical)
            places.append(_Place("output", 0, tied, gather))
        elif block is not None:
            places.append(_Place("block", block, plan, gather))
        else:
            places.append(_Place(parts.get(plan.name, "outside"), 0, plan, gather))
    return places


def _check_complete(decoder: Decoder, places: Sequence[_Place]) -> None:
    """Every weight that a forward pass needs must have been planned by mergekit."""
    planned = {decoder.canonical(place.plan.name) for place in places}
    missing = [name for name, _ in decoder.model.named_parameters() if name not in planned]
    if missing:
        raise ArchitectureError(
            f"mergekit plans no tensor for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}, which the forward pass of "
            f"{type(decoder.model).__name__} needs; mergekit's definition of this architecture "
            f"does not fit transformers' model"
        )


def _chain(
    planned: Sequence[Planned],
    places: Sequence[_Place],
    models: Models,
    prepared: Prepared,
    artifacts: Callable[[Record], None],
) -> Graph:
    """Stages in the order the data passes them, each behind the one before."""
    stages = [("input", 0), *(("block", i) for i in range(len(models.output.blocks)))]
    stages.append(("output", 0))
    record, tasks = Record(), {}
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
            stage=Stage(models, kind, index, [place.plan for place in own]),  # type: ignore[arg-type]
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


def _labelled(task: Task, label: str) -> Task:
    """The same gather, vocabulary adapters included, scheduled with its stage."""
    if isinstance(task, (PermutedVocabulary, TruncatedVocabulary)):
        return task.model_copy(update={"gather_tensors": _labelled(task.gather_tensors, label)})
    values = {name: getattr(task, name) for name in GatherTensors.model_fields}
    return StageGather(**values, label=label)


def _average(place: _Place, order: tuple[ModelReference, ...]) -> tuple[MergeKnown, torch.Tensor]:
    start = place.plan.settings.parametrisation.starting_coefficients()
    known = KnownCoefficients(place.plan, order, start, -1)
    return MergeKnown(tensors=place.gather, known=known), start


def _replay(
    planned: Sequence[Planned],
    plans: Sequence[TensorPlan],
    order: tuple[ModelReference, ...],
    saved: CoefficientFile,
) -> tuple[list[tuple[WeightInfo, Task]], Record]:
    """Merge every tensor with the coefficients of an earlier merge."""
    rows = saved.rows_of([str(model) for model in order])
    missing = [plan.name for plan in plans if plan.name not in saved.coefficients]
    if missing:
        raise ConfigError(
            [
                f"coefficients: the file has none for {', '.join(missing[:3])}"
                f"{' and others' if len(missing) > 3 else ''}; it belongs to another model or "
                f"another choice of layers"
            ]
        )
    tensors, record = [], Record()
    for (weight, task), plan in zip(planned, plans, strict=True):
        coefficients = saved.coefficients[plan.name][rows]
        axis = saved.metadata.get("axes", {}).get(plan.name, -1)
        known = KnownCoefficients(plan, order, coefficients, axis)
        tensors.append((weight, MergeKnown(tensors=task.gather_tensors, known=known)))
        record.coefficients[plan.name] = coefficients
        record.reports[plan.name] = TensorReport(plan.name, "replay", "replayed")
        if axis != -1:
            record.axes[plan.name] = axis
    return tensors, record


def write_artifacts(
    prepared: Prepared,
    order: Sequence[ModelReference],
    trust_remote_code: bool,
    parameters: Mapping[str, Any],
    out_path: Path,
    record: Record,
) -> None:
    """Write `dam_coefficients.safetensors` and `dam_report.json`."""
    sources = [str(model) for model in order]
    if prepared.replay is not None:
        provenance = {k: v for k, v in prepared.replay.metadata.items() if k != "axes"}
    else:
        provenance = {
            "versions": report.versions(),
            "revisions": {str(m): _revision(m, trust_remote_code) for m in order},
            "parameters": dict(parameters),
            "calibration_sha256": {
                str(m): c.provenance.sha256 for m, c in prepared.calibration.items()
            },
        }
    CoefficientFile(record.coefficients, tuple(sources), {**provenance, "axes": record.axes}).save(
        out_path / FILE_NAME
    )
    report.write(
        out_path / report.FILE_NAME,
        {
            **provenance,
            "sources": sources,
            "replayed": prepared.replay is not None,
            "calibration": {
                str(m): dataclasses.asdict(c.provenance) for m, c in prepared.calibration.items()
            },
            "seconds": record.seconds,
            "peak_memory_bytes": report.peak_memory(),
            "tensors": [
                report.tensor_entry(entry, record.coefficients[name], sources)
                for name, entry in record.reports.items()
            ],
        },
    )


def _revision(model: ModelReference, trust_remote_code: bool) -> str | None:
    """The commit that a Hub model was loaded at, or None for a local one."""
    config = model.config(trust_remote_code=trust_remote_code)
    revision: str | None = getattr(config, "_commit_hash", None) or model.model.revision
    return revision
