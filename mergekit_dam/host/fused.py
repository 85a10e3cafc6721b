"""Fuses experts that mergekit plans one by one into the tensors that transformers' models have.

mergekit's definition of an architecture may list the weights of every expert as checkpoints store
them. transformers knows how its fused tensors are made from these, and mergekit's loader makes a
fused tensor when it is asked for one by name. So the fused tensors are planned. After they are
merged, the tensors that mergekit asked for are cut out of them.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from mergekit.common import ImmutableMap
from torch import Tensor

from mergekit_dam.host.compat import GatherTensors
from mergekit_dam.host.compat import convert as convert
from mergekit_dam.host.headers import WeightTask

_PROBE = (2, 3)
"""Shape of the probe tensors that show where each piece lies in a fused tensor."""

_BLOCK = re.compile(r"^.*?\.\d+\.")
"""Common prefix of the names of one block."""


@dataclass(frozen=True)
class Region:
    """Position of one piece in a fused tensor `[experts, ., .]`.

    Attributes:
        whole: name of the fused tensor.
        expert: index of the expert that owns the piece.
        row, column: index of the piece among those of the expert, along each dimension.
        rows, columns: number of pieces along each dimension.
    """

    whole: str
    expert: int
    row: int
    column: int
    rows: int
    columns: int

    def cut(self, whole: Tensor) -> Tensor:
        """A copy of the piece."""
        expert = whole[self.expert]
        rows = expert.tensor_split(self.rows, dim=0)[self.row]
        return rows.tensor_split(self.columns, dim=1)[self.column].clone()


def fuse_experts(
    planned: Sequence[WeightTask], needed: Collection[str], model_type: str
) -> tuple[list[WeightTask], dict[str, Region]]:
    """Plan fused tensors in place of the pieces that they are made from.

    Args:
        planned: mergekit's tensors, each with the task that would merge it.
        needed: names of tensors that the model needs and the plan lacks.
        model_type: type of the merged model in transformers.

    Returns:
        The new plan, and the position of each fused piece by its name. Tensors that cannot be
        made from planned ones are still missing.
    """
    names = [weight.name for weight, _ in planned]
    regions: dict[str, Region] = {}
    for name in sorted(needed):
        regions |= _regions(name, names, model_type)
    result: list[WeightTask] = []
    done = set()
    for weight, task in planned:
        region = regions.get(weight.name)
        if region is None:
            result.append((weight, task))
        elif region.whole not in done:
            done.add(region.whole)
            result.append(_fused((weight, task), region.whole))
    return result, regions


def _regions(name: str, planned: Sequence[str], model_type: str) -> dict[str, Region]:
    """Positions of the pieces from which transformers makes a tensor; none if it cannot.

    They are found by fusing small probe tensors in which all values differ.
    """
    block = _BLOCK.match(name)
    if block is None:
        return {}
    size = math.prod(_PROBE)
    probes = {
        piece: (size * number + torch.arange(float(size))).reshape(_PROBE)
        for number, piece in enumerate(p for p in planned if p.startswith(block[0]))
    }
    whole = convert(model_type, probes, name)
    if whole is None or whole.ndim != 3:
        return {}
    rows, columns = whole.shape[1] // _PROBE[0], whole.shape[2] // _PROBE[1]
    names, found = list(probes), {}
    for expert in range(len(whole)):
        for row in range(rows):
            for column in range(columns):
                region = Region(name, expert, row, column, rows, columns)
                piece = names[int(region.cut(whole)[0, 0]) // size]
                if not region.cut(whole).equal(probes[piece]):  # transposed, for example
                    return {}
                found[piece] = region
    return found


def _fused(piece: WeightTask, name: str) -> WeightTask:
    """The fused tensor's plan, made from the plan of one of its pieces."""
    weight, task = piece
    gather = task.gather_tensors
    assert isinstance(gather, GatherTensors)
    block = _BLOCK.match(name)
    assert block is not None
    infos = {}
    for model, info in gather.weight_info.items():
        own = _BLOCK.match(info.name)  # with slices, the source's block may have another number
        assert own is not None
        infos[model] = info.model_copy(
            update={"name": own[0] + name[block.end() :], "optional": False}
        )
    output = weight.model_copy(update={"name": name, "optional": False})
    gathered = gather.model_copy(update={"weight_info": ImmutableMap(infos)})
    return output, task.model_copy(update={"gather_tensors": gathered, "output_weight": output})
