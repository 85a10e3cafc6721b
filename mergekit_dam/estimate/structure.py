"""The units of a part, found from shapes: it runs once on weights of zeros that take no memory.

The fit itself examines the values that every module returns (`model.anatomy`), for which it needs
weights. Without them the shapes have to do: a matrix that gets features is a linear, a vector as
wide as its input is a norm, a matrix that gets integers is an embedding. Which linears share an
input is decided by the same function as in the fit.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_dam.model.experts import routing_of, run_expert
from mergekit_dam.model.hooks import own_weights
from mergekit_dam.model.part import Part
from mergekit_dam.model.units import grouped

Kind = Literal["linear", "norm", "embedding", "head", "router", "experts", "other"]


@dataclass(frozen=True)
class UnitShape:
    """Sizes of a module that owns parameters.

    Attributes:
        name: path of the module, relative to the part.
        kind: as in the fit; an output head has a kind of its own.
        enters: features of its input; of an embedding, the number of rows.
        leaves: features of its output.
        parameters: number of elements of its parameters.
        linears: the linears of one expert, if these are experts.
        experts: number of experts.
        sent: number of experts that each token is sent to.
    """

    name: str
    kind: Kind
    enters: int
    leaves: int
    parameters: int
    linears: "tuple[UnitShape, ...]" = ()
    experts: int = 0
    sent: int = 0

    @property
    def product(self) -> int:
        """Flops per token of its products of matrices."""
        if self.kind == "experts":
            return self.sent * sum(linear.product for linear in self.linears)
        return 2 * self.enters * self.leaves if self.kind in ("linear", "router") else 0


Group = tuple[UnitShape, ...]
"""Units that are fitted together: linears that see one input, or one other unit."""


@torch.no_grad()
def groups_of(
    part: Part, shapes: Mapping[str, tuple[int, ...]], entering: Tensor, head: str | None
) -> tuple[Group, ...]:
    """The units of a part, grouped as they are fitted, in the order the data passes them.

    Args:
        part: the part of the merged model.
        shapes: shapes of the part's parameters, by names relative to it.
        entering: a few token ids or hidden states to run it on.
        head: name of the output head's module.
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
    # Once more, without hooks: an expert is run by running the module of all.
    met = [(_with_linears(part, unit, x, shapes), x) for unit, x in seen]
    return grouped(met, operator.is_)


def _with_linears(
    part: Part, unit: UnitShape, x: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> UnitShape:
    """Add to experts the linears that each of them has; any other unit is returned as it is."""
    if unit.kind != "experts":
        return unit
    module = part.root.get_submodule(unit.name)
    own = {name: shapes[f"{unit.name}.{name}"] for name, _ in module.named_parameters()}
    # Each has zeros of its own: products are told apart by the memory of their weights.
    weights = {name: torch.zeros(()).expand(shape[1:]) for name, shape in own.items()}
    _, products = run_expert(module, weights, x)
    linears = tuple(
        UnitShape(
            f"{unit.name}.{name}",
            "linear",
            product.input.shape[-1],
            product.output.shape[-1],
            math.prod(own[name][1:]),
        )
        for name, product in products.items()
    )
    return replace(unit, linears=linears, experts=next(iter(own.values()))[0])


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
    """Note a unit and its input when it is called for the first time."""
    x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if x is None or any(unit.name == name for unit, _ in seen):
        return
    leaves = output.shape[-1] if isinstance(output, Tensor) else 0
    weight, routing = shapes[0], routing_of(args, kwargs)
    if not x.is_floating_point():
        found: Kind = "embedding" if len(weight) == 2 else "other"
        enters = weight[0]
    else:
        enters = x.shape[-1]
        routes = isinstance(output, tuple) and len(weight) == 2 and weight[1] == enters
        linear = len(weight) == 2 and sorted(weight) == sorted((enters, leaves))
        norm = len(weight) == 1 and weight[0] == enters == leaves
        found = "linear" if linear else "norm" if norm else "router" if routes else "other"
        leaves = weight[0] if routes else leaves
    if routing is not None:
        found = "experts"
    if kind is not None and found == "linear":
        found = kind
    parameters = sum(math.prod(shape) for shape in shapes)
    sent = 0 if routing is None else routing.experts.shape[1]
    seen.append((UnitShape(name, found, enters, leaves, parameters, sent=sent), x))
