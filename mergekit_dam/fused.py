"""Experts that mergekit plans one by one, as the fused tensors that transformers' models run on.

mergekit's definition of an architecture may list the weights of every expert as checkpoints hold
them. transformers knows which of its tensors it makes of them; mergekit makes them when it loads
a tensor by such a name. So these are planned, and written.
"""

import re
from collections.abc import Collection, Sequence

import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ImmutableMap
from mergekit.io.tasks import GatherTensors
from torch import Tensor

from mergekit_dam.places import Planned

_BLOCK = re.compile(r"^.*?\.\d+\.")
"""What names of one block begin with."""


def fuse_experts(
    planned: Sequence[Planned], needed: Collection[str], model_type: str
) -> tuple[list[Planned], dict[str, tuple[str, ...]]]:
    """Plan tensors that are needed, in place of those that they are made of.

    Args:
        needed: names that are not planned.
        model_type: of the merged model.

    Returns:
        The new plan, and by name of a new tensor what it is made of. What cannot be made of
        planned tensors is still missing.
    """
    by_name = {weight.name: (weight, task) for weight, task in planned}
    made = {name: _made_of(name, by_name, model_type) for name in sorted(needed)}
    made = {name: pieces for name, pieces in made.items() if pieces}
    first = {pieces[0]: name for name, pieces in made.items()}
    gone = {piece for pieces in made.values() for piece in pieces}
    result: list[Planned] = []
    for weight, task in planned:
        if weight.name in first:
            result.append(_fused((weight, task), first[weight.name]))
        elif weight.name not in gone:
            result.append((weight, task))
    return result, made


def _made_of(name: str, planned: Collection[str], model_type: str) -> tuple[str, ...]:
    """The planned tensors that transformers makes a tensor of."""
    block = _BLOCK.match(name)
    if block is None:
        return ()
    used: list[str] = []

    def use(piece: str) -> Tensor:
        used.append(piece)
        return torch.zeros(1, 1)

    pieces = {p: lambda p=p: use(p) for p in planned if p.startswith(block[0])}
    found = convert_checkpoint_tensors(model_type, pieces, name)
    return () if found is None else tuple(used)


def _fused(piece: Planned, name: str) -> Planned:
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
