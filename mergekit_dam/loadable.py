"""Tensors that mergekit can load, and would yet leave out of the merged model, or load in pieces.

Where an architecture is inferred, mergekit calls a tensor optional that one layer has and another
has not, and skips optional tensors that no file holds by that name, though its loader would make
them of others (experts that are fused, weights that are renamed). Where a definition lists the
pieces of a fused tensor, the fit needs the whole, which is what transformers' model has.
"""

from collections.abc import Sequence

from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_dam.skeleton import WeightNames

Planned = tuple[WeightInfo, ExecuteMergeMethodTask]


def kept(
    weight: WeightInfo, inputs: Sequence[WeightInfo], models: Sequence[ModelReference]
) -> tuple[WeightInfo, list[WeightInfo]]:
    """An optional tensor is none where every model's loader can make it of other tensors."""
    pairs = zip(models, inputs, strict=True)
    if not weight.optional or not all(_is_made(model, info.name) for model, info in pairs):
        return weight, list(inputs)
    required = {"optional": False}
    return weight.model_copy(update=required), [i.model_copy(update=required) for i in inputs]


def _is_made(model: ModelReference, name: str) -> bool:
    cache = LoaderCache()
    stored = cache.get(model).index.tensor_paths
    if name in stored:
        return False
    model_type = model.config(trust_remote_code=cache.trust_remote_code).model_type
    return bool(can_convert_checkpoint_keys(model_type, set(stored), name))


def fused(planned: Sequence[Planned], names: WeightNames) -> list[Planned]:
    """Pieces of a fused tensor become that tensor, once, with the parameters of the first piece."""
    result: dict[str, Planned] = {}
    for weight, task in planned:
        whole = names.whole(weight.name)
        gather = task.gather_tensors
        if whole is None or not isinstance(gather, GatherTensors):
            result[weight.name] = (weight, task)
        elif whole not in result:
            info = {model: _renamed(i, names) for model, i in gather.weight_info.items()}
            gather = gather.model_copy(update={"weight_info": ImmutableMap(data=info)})
            output = WeightInfo(name=whole)
            update = {"gather_tensors": gather, "output_weight": output}
            result[whole] = (output, task.model_copy(update=update))
    return list(result.values())


def _renamed(piece: WeightInfo, names: WeightNames) -> WeightInfo:
    return WeightInfo(name=names.whole(piece.name) or piece.name, force_dtype=piece.force_dtype)
