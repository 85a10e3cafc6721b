"""The tasks of a merge whose coefficients are fitted.

1. Every tensor is placed: in the input, a block or the output of the decoder, or outside of it.
2. The tensors of one place form a stage.
3. One sweep of layer fits is a chain of stages that writes tensors as it goes. A search goes
   through the stages as often as it needs to; a sweep that writes follows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from mergekit.common import ModelReference

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.host.checks import check_complete, check_shapes, refuse_outside
from mergekit_dam.host.headers import spans_of
from mergekit_dam.host.initial import averages, check_start, search_start
from mergekit_dam.host.merge import Merge, Tasks, Tensors
from mergekit_dam.host.phases import one_sweep_phases, search_phases
from mergekit_dam.host.places import PlacedTensor, place_tensors
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.host.replay import start_record
from mergekit_dam.host.room import written_bytes
from mergekit_dam.host.stages import PlannedStage, calibration_streams, load_stage, planned_stages
from mergekit_dam.host.tasks import (
    FitStage,
    Known,
    MergedTensor,
    MergeKnown,
    Search,
    SearchNode,
    StageNode,
)
from mergekit_dam.layers.sweep import Sweep
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.sources.decoders import source_decoders
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.stage import Models
from mergekit_dam.streams import progress
from mergekit_dam.streams.memory import limit_gpu
from mergekit_dam.streams.stream import Stream
from mergekit_dam.threads import use_own_share

MakeStreams: TypeAlias = Callable[[], list[Stream]]


def fitted_tasks(merge: Merge, tensors: Tensors, decoder: Decoder) -> Tasks:
    """Fit the tensors that the decoder runs on, and average the rest.

    Args:
        merge: the merge.
        tensors: its tensors, placed by this function.
        decoder: the decoder of the merged model.

    Raises:
        ArchitectureError: a tensor is missing, or its shape is not the one in the configuration.
        ConfigError: the start does not fit, or weights outside of the decoder are refused.
    """
    prepared = merge.prepared
    models = Models(
        decoder,
        source_decoders(decoder, tensors.order, merge.options, merge.stacks),
        tensors.order,
        prepared.run,
        unknown=_unknown_tokens(prepared, tensors.order),
    )
    placed = _checked_places(merge, tensors, models)
    stages = planned_stages(placed, models)
    device = torch.device(merge.options.device or "cpu")
    limit_gpu(device, prepared.run.gpu_memory)
    hidden = decoder.config.get_text_config().hidden_size
    use_own_share(hidden)
    written = written_bytes(tensors.specs, tensors.shapes, merge.config.dtype)
    streams = functools.partial(
        calibration_streams, prepared, tensors.order, hidden, device, merge.out_path, written
    )
    outside = averages(placed)
    phases = one_sweep_phases if prepared.run.one_sweep else search_phases
    progress.plan(phases([planned.stage for planned in stages], tensors.shapes, prepared))
    if prepared.run.one_sweep:
        sweep = Sweep(merge.journal, "layer", len(stages), streams, outside)
        tasks = _one_sweep(stages, sweep, device)
    else:
        start = _start(merge, tensors, stages, outside)
        tasks = _search(stages, streams, start, device, merge)
    tasks.merged |= {
        tensor.spec.name: tensors.known(tensor.spec, tensor.gather, outside)
        for tensor in placed
        if tensor.kind == "outside"
    }
    return tasks


def _checked_places(merge: Merge, tensors: Tensors, models: Models) -> list[PlacedTensor]:
    """Place every tensor, and check that the models can run on them."""
    placed = place_tensors(tensors.tasks, tensors.specs, models.output)
    for decoder in (models.output, *models.sources):
        check_complete(decoder, placed)
    check_shapes(models.output, tensors.shapes)
    if merge.prepared.run.other_weights == "error":
        refuse_outside(placed)
    return placed


def _unknown_tokens(prepared: Prepared, order: Sequence[ModelReference]) -> dict[int, torch.Tensor]:
    """Source -> the tokens that it does not have, for sources that lack some."""
    if prepared.vocabulary is None:
        return {}
    found = {source: prepared.vocabulary.unknown_to(model) for source, model in enumerate(order)}
    return {source: tokens for source, tokens in found.items() if tokens is not None}


def _start(
    merge: Merge, tensors: Tensors, stages: Sequence[PlannedStage], outside: MergeRecord
) -> MergeRecord:
    """The coefficients that a search starts from."""
    prepared = merge.prepared
    saved = None
    if prepared.start is not None:
        saved = start_record(prepared, prepared.start, tensors)
    start = search_start([planned.stage for planned in stages], prepared.run, outside, saved)
    check_start(tensors.specs, start, prepared.run)
    return start


def _one_sweep(stages: Sequence[PlannedStage], sweep: Sweep, device: torch.device) -> Tasks:
    """One sweep: each stage waits for the one before; tensors are written as they are fitted."""
    tasks = Tasks()
    previous: FitStage | None = None
    for number, planned in enumerate(stages):
        planned = planned.without_borrowed()
        if previous is not None:
            previous.node.ahead = spans_of(planned.gathers)
        previous = FitStage(node=StageNode(planned, number, previous, sweep, device))
        for spec in planned.stage.tensors:
            tasks.merged[spec.name] = MergedTensor(fit=previous, name=spec.name)
    tasks.last = previous
    return tasks


def _search(
    stages: Sequence[PlannedStage],
    streams: MakeStreams,
    start: MergeRecord,
    device: torch.device,
    merge: Merge,
) -> Tasks:
    """One task for all sweeps; then every tensor is merged with the best coefficients."""
    run, started = merge.prepared.run, merge.prepared.started
    network = Network(
        [planned.stage for planned in stages],
        load=lambda number: load_stage(stages[number]),
        spans=functools.cache(lambda number: spans_of(stages[number].gathers)),
        device=device,
        resident=run.resident,
    )
    fit = Search(node=SearchNode(network, streams, run, start, merge.journal, started))
    tasks = Tasks(last=fit)
    for planned in stages:
        order = planned.stage.models.order
        # Not strict: the gathers of borrowed tensors come last, and their own stage merges those.
        for spec, gather in zip(planned.stage.tensors, planned.gathers, strict=False):
            tasks.merged[spec.name] = MergeKnown(known=Known(spec, gather, order), fit=fit)
    return tasks
