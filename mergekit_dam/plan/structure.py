"""What a part is made of, as far as shapes tell: run once on weights of zeros that take no memory.

The fit itself looks at what every module returns (`anatomy`), for which it needs weights. Here a
matrix that is fed features counts as a linear, a vector as wide as what passes as a norm, and
what is fed integers as an embedding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_dam.decoder import own_weights
from mergekit_dam.part import Part

Kind = Literal["linear", "norm", "embedding", "head", "other"]


@dataclass(frozen=True)
class UnitShape:
    """A module that owns parameters.

    Attributes:
        name: relative to the part.
        enters, leaves: features of what enters and leaves it; rows of an embedding enter.
        parameters: how many it has.
    """

    name: str
    kind: Kind
    enters: int
    leaves: int
    parameters: int


Group = tuple[UnitShape, ...]
"""Units that see one input: a stage of the fit."""


@torch.no_grad()
def groups_of(
    part: Part, shapes: Mapping[str, tuple[int, ...]], entering: Tensor, head: str | None
) -> tuple[Group, ...]:
    """The units of a part in the order the data passes them; linears of one input together.

    Args:
        shapes: of the part's parameters, by names relative to it.
        entering: a few token ids, or hidden states.
        head: name of the output head's unit.
    """
    zero = torch.zeros(())
    weights = {name: zero.expand(shape) for name, shape in shapes.items()}
    seen: list[tuple[UnitShape, Tensor]] = []
    handles = []
    for name, module in part.root.named_modules():
        prefix = f"{name}." if name else ""
        own = [shapes.get(prefix + n) for n in own_weights(module)]
        known = [shape for shape in own if shape is not None]
        if known:
            hook = partial(_see, seen, name, known, "head" if name == head else None)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        part.run(weights, entering)
    finally:
        for handle in handles:
            handle.remove()
    return _grouped(seen)


def _see(
    seen: list[tuple[UnitShape, Tensor]],
    name: str,
    shapes: Sequence[tuple[int, ...]],
    kind: Kind | None,
    _: Any,
    args: Any,
    kwargs: Mapping[str, Any],
    output: Any,
) -> None:
    """Note a unit with what entered it, once."""
    x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if x is None or any(unit.name == name for unit, _ in seen):
        return
    leaves = output.shape[-1] if isinstance(output, Tensor) else 0
    weight = shapes[0]
    if not x.is_floating_point():
        found: Kind = "embedding" if len(weight) == 2 else "other"
        enters = weight[0]
    else:
        enters = x.shape[-1]
        linear = len(weight) == 2 and sorted(weight) == sorted((enters, leaves))
        norm = len(weight) == 1 and weight[0] == enters == leaves
        found = "linear" if linear else "norm" if norm else "other"
    if kind is not None and found == "linear":
        found = kind
    parameters = sum(math.prod(shape) for shape in shapes)
    seen.append((UnitShape(name, found, enters, leaves, parameters), x))


def _grouped(seen: Sequence[tuple[UnitShape, Tensor]]) -> tuple[Group, ...]:
    groups: list[list[tuple[UnitShape, Tensor]]] = []
    for unit, x in seen:
        same = (g for g in groups if unit.kind == g[0][0].kind == "linear" and g[0][1] is x)
        group = next(same, None)
        if group is None:
            groups.append([(unit, x)])
        else:
            group.append((unit, x))
    return tuple(tuple(unit for unit, _ in group) for group in groups)
