"""Experts that mergekit plans one by one, as the fused tensors that transformers' models run on.

mergekit's definition of an architecture may list the weights of every expert as checkpoints hold
them. transformers knows which of its tensors it makes of them; mergekit makes them when it loads
a tensor by such a name. So these are planned, and when they are merged, what mergekit asked for
is cut out of them.
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
"""Shape of the tensors that show where in a fused one they come to lie."""

_BLOCK = re.compile(r"^.*?\.\d+\.")
"""What names of one block begin with."""


@dataclass(frozen=True)
class Region:
    """Where in a fused tensor `[experts, ., .]` one of its pieces lies.

    Attributes:
        whole: name of the fused tensor.
        expert: whose piece it is.
        row, column: number among the pieces of the expert, along each dimension.
        rows, columns: how many pieces there are.
    """

    whole: str
    expert: int
    row: int
    column: int
    rows: int
    columns: int

    def cut(self, whole: Tensor) -> Tensor:
        """The piece, a copy."""
        expert = whole[self.expert]
        rows = expert.tensor_split(self.rows, dim=0)[self.row]
        return rows.tensor_split(self.columns, dim=1)[self.column].clone()


def fuse_experts(
    planned: Sequence[WeightTask], needed: Collection[str], model_type: str
) -> tuple[list[WeightTask], dict[str, Region]]:
    """Plan tensors that are needed, in place of those that they are made of.

    Args:
        needed: names that are not planned.
        model_type: of the merged model.

    Returns:
        The new plan, and where tensors of the old one lie in those of the new. What cannot be
        made of planned tensors is still missing.
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
    """Where the tensors that transformers makes one of come to lie in it; none if it cannot.

    That is seen by having it done, with small ones that differ everywhere.
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
                if not region.cut(whole).equal(probes[piece]):  # turned around, say
                    return {}
                found[piece] = region
    return found


def _fused(piece: WeightTask, name: str) -> WeightTask:
    """A planned piece as the tensor that is made of it and others."""
    weight, task = piece
    gather = task.gather_tensors
    assert isinstance(gather, GatherTensors)
    block = _BLOCK.match(name)
    assert block is not None
    infos = {}
    for model, info in gather.weight_info.items():
        own = _BLOCK.match(info.name)  # another block's, with slices
        assert own is not None
        infos[model] = info.model_copy(
            update={"name": own[0] + name[block.end() :], "optional": False}
        )
    output = weight.model_copy(update={"name": name, "optional": False})
    gathered = gather.model_copy(update={"weight_info": ImmutableMap(infos)})
    return output, task.model_copy(update={"gather_tensors": gathered, "output_weight": output})
