"""The parameters of a merge with all defaults, as they are kept beside the merged model."""

import json
from collections.abc import Mapping
from typing import Any

from mergekit_dam.host.compat import ExecuteMergeMethodTask
from mergekit_dam.host.merge import Merge, Tensors
from mergekit_dam.host.names import Names
from mergekit_dam.parameters import UNRECORDED, ModelParameters, TensorParameters


def resolved_parameters(merge: Merge, tensors: Tensors) -> dict[str, Any]:
    """Parameters of the merge, and those of every tensor; tensors with equal ones share an entry.

    Returns:
        `merge`: the parameters of the whole merge by name. `tensors`: a list of entries with
        `parameters` by name, `models` with those of every model, and `tensors`, the names.
    """
    run = merge.prepared.run
    groups: dict[str, list[str]] = {}
    for weight, task in tensors.tasks:
        own = json.dumps(_of_tensor(task, merge.prepared.names), sort_keys=True)
        groups.setdefault(own, []).append(weight.name)
    return {
        "merge": merge.prepared.names.tree(run.model_dump(mode="json", exclude=set(UNRECORDED))),
        "tensors": [{**json.loads(own), "tensors": names} for own, names in groups.items()],
    }


def _of_tensor(task: ExecuteMergeMethodTask, names: Names) -> Mapping[str, Any]:
    # A model's text is no parameter of a tensor: the calibration says where it is from.
    read = [name for name in ModelParameters.model_fields if name != "calibration"]
    return {
        "parameters": {name: task.parameters[name] for name in TensorParameters.model_fields},
        "models": {
            names.of(model): {name: task.input_parameters[model][name] for name in read}
            for model in task.model_order
        },
    }
