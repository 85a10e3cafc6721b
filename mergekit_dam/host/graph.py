"""Turns mergekit's planned tensors into the tasks of a dam merge.

1. Headers are checked: every source has every tensor, in one shape.
2. Experts that mergekit plans one by one are fused, because the models run on fused ones.
3. If the coefficients are known, every tensor is merged by itself (`known_graph`). If they are to
   be fitted, the tensors form stages (`fitted_graph`).
4. Fused experts are cut into the tensors that mergekit asked for.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_dam.host.artifacts import write_artifacts
from mergekit_dam.host.checks import check_headers
from mergekit_dam.host.compat import WeightInfo
from mergekit_dam.host.fitted_graph import fitted_tasks
from mergekit_dam.host.fused import Region, fuse_experts
from mergekit_dam.host.headers import WeightTask
from mergekit_dam.host.known_graph import known_tasks
from mergekit_dam.host.merge import Merge, Tensors
from mergekit_dam.host.replay import in_rows
from mergekit_dam.host.specs import tensor_spec
from mergekit_dam.host.tasks import Piece, WriteArtifacts
from mergekit_dam.model.decoder import Decoder


@dataclass(frozen=True)
class Graph:
    """The tasks that replace mergekit's, and one more that writes coefficients and report."""

    tensors: list[tuple[WeightInfo, Task[Any]]]
    artifacts: WriteArtifacts


def build_graph(
    planned: Sequence[WeightTask],
    merge: Merge,
    teaching: Mapping[str, frozenset[ModelReference]],
) -> Graph:
    """Rewrite mergekit's plan of single tensors.

    Args:
        planned: mergekit's tensors, each with the task that would merge it.
        merge: the merge.
        teaching: output tensor -> the models that are read for it but not merged.

    Raises:
        ArchitectureError: the model cannot be split into blocks, or a tensor is missing.
        ConfigError: coefficients to replay do not fit the models.
    """
    prepared = merge.prepared
    fitted = prepared.replay is None and prepared.checked.learns
    decoder = merge.decoder() if fitted else None
    tensors = _planned_tensors(planned, merge, teaching, decoder)
    if decoder is None:
        tasks = known_tasks(merge, tensors)
    else:
        tasks = fitted_tasks(merge, tensors, decoder)
    artifacts = WriteArtifacts(
        last=tasks.last,
        write=partial(
            write_artifacts,
            merge,
            tensors,
        ),
        record=tasks.record,
    )
    asked = [weight for weight, _ in planned]
    return Graph(_as_asked(asked, tasks.merged, tensors.regions), artifacts)


def _planned_tensors(
    planned: Sequence[WeightTask],
    merge: Merge,
    teaching: Mapping[str, frozenset[ModelReference]],
    decoder: Decoder | None,
) -> Tensors:
    """The tensors to merge; experts are fused if the decoder or the file to replay fuses them."""
    prepared = merge.prepared
    order = tuple(dict.fromkeys(model for _, task in planned for model in task.model_order))
    if prepared.replay is not None:
        order = in_rows(prepared, order)
    shapes = check_headers(planned, order)
    needed: Collection[str] = ()
    if prepared.replay is not None:
        needed = prepared.replay.coefficients.keys()
    elif decoder is not None:
        needed = [name for name, _ in decoder.model.named_parameters()]
    names = (weight.name for weight, _ in planned)
    own = {name if decoder is None else decoder.names.in_model(name) for name in names}
    tasks, regions = fuse_experts(planned, set(needed) - own, merge.config.model_type)
    if regions:
        whole = {r.whole: teaching.get(name, frozenset()) for name, r in regions.items()}
        teaching = {**teaching, **whole}
        shapes = check_headers(tasks, order)
    specs = [
        tensor_spec(weight, task, order, prepared, merge.out_dtype, teaching.get(weight.name, ()))
        for weight, task in tasks
    ]
    return Tensors(tasks, specs, shapes, order, regions)


def _as_asked(
    asked: Sequence[WeightInfo], tasks: Mapping[str, Task[Any]], regions: Mapping[str, Region]
) -> list[tuple[WeightInfo, Task[Any]]]:
    """The tensors that mergekit planned; pieces of fused tensors are cut out of the merged ones."""
    found: list[tuple[WeightInfo, Task[Any]]] = []
    for weight in asked:
        region = regions.get(weight.name)
        if region is None:
            found.append((weight, tasks[weight.name]))
        else:
            found.append((weight, Piece(whole=tasks[region.whole], region=region)))
    return found
