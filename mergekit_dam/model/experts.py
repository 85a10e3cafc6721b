"""Mixtures of experts: what is fed to them, and what one expert makes of some tokens.

transformers keeps the experts of a block in one module, whose parameters `[experts, ., .]` hold
a slice for each of them, and which is called with hidden states, the experts that each token is
sent to, and with what weight each of them counts. No more is relied on: the linears inside are
seen by running one expert and looking out for products with its slices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

ACCURACY = 1e-3
"""Relative deviation up to which two recorded fp32 effects count as equal."""


class Routing(NamedTuple):
    """What experts are called with.

    Attributes:
        hidden: hidden states `[tokens, hidden]`.
        experts: of each token, int64 `[tokens, k]`.
        weights: with which their outputs are added up, `[tokens, k]`.
    """

    hidden: Tensor
    experts: Tensor
    weights: Tensor

    def weight_of(self, expert: int) -> Tensor:
        """With which weight an expert counts for each token, `[tokens]`; 0 if it is not sent."""
        return (self.weights * (self.experts == expert)).sum(1)

    @classmethod
    def joined(cls, chunks: Sequence["Routing"]) -> "Routing":
        """Chunks in one, in order."""
        return cls(*(torch.cat(tensors) for tensors in zip(*chunks, strict=True)))


@dataclass(frozen=True)
class FusedLinear:
    """A linear that every expert has.

    Attributes:
        parameter: name of the fused weight.
        axis: its input dimension: -1 for `[experts, out, in]`, 1 where it is transposed.
    """

    parameter: str
    axis: int


class Product(NamedTuple):
    """Inputs `[tokens, in]` and outputs `[tokens, out]` of one linear of an expert.

    Its weight may be `[in, out]`: transposed.
    """

    input: Tensor
    output: Tensor
    transposed: bool


def routing_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Routing | None:
    """The routing that a module is called with, or None if its call is none of experts."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 3 or any(tensor.ndim != 2 for tensor in tensors):
        return None
    routing = Routing(*tensors)
    hidden, experts, weights = routing
    fits = experts.shape == weights.shape and len(hidden) == len(experts)
    kinds = (hidden.is_floating_point(), experts.dtype, weights.is_floating_point())
    return routing if fits and kinds == (True, torch.int64, True) else None


def run_expert(
    module: nn.Module, weights: Mapping[str, Tensor], x: Tensor
) -> tuple[Tensor, dict[str, Product]]:
    """What one expert makes of tokens, and what its linears do on the way.

    Args:
        module: of all experts.
        weights: the expert's slices of the module's parameters, by name.
        x: hidden states `[tokens, hidden]`.

    Returns:
        Hidden states `[tokens, hidden]`, and the products with each slice, by name.
    """
    # Every expert is this one, which takes no memory, and all tokens are sent to the first.
    given = {
        name: weight[None].expand(module.get_parameter(name).shape[0], *weight.shape)
        for name, weight in weights.items()
    }
    first = torch.zeros((len(x), 1), dtype=torch.int64, device=x.device)
    with Products(weights) as products:
        output: Tensor = functional_call(module, given, (x, first, x.new_ones(len(x), 1)))
    return output, products.seen


@torch.no_grad()
def fused_linears(
    module: nn.Module, weights: Mapping[str, Tensor], routing: Routing, output: Any
) -> tuple[FusedLinear, ...]:
    """The linears of a module's experts, in the order in which data passes them.

    Args:
        weights: the module's own parameters.
        routing: what it was called with.
        output: what it made of that.

    Returns:
        Nothing if the experts, one by one, do not add up to the output.
    """
    sizes = {weight.shape[0] if weight.ndim else 0 for weight in weights.values()}
    if len(sizes) != 1 or not isinstance(output, Tensor) or output.shape != routing.hidden.shape:
        return ()
    (count,) = sizes
    total, found = torch.zeros_like(output), dict[str, FusedLinear]()
    for expert in range(count):
        own = {name: weight[expert] for name, weight in weights.items()}
        try:
            made, products = run_expert(module, own, routing.hidden)
        except (RuntimeError, LookupError, TypeError):
            return ()
        total += routing.weight_of(expert)[:, None] * made
        found = {
            name: FusedLinear(name, 1 if product.transposed else -1)
            for name, product in products.items()
        }
    whole = bool(found) and close(total, output)
    return tuple(found.values()) if whole else ()


@torch.no_grad()
def makes_logits(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether a module multiplies what enters it with its weight, whatever it makes of that.

    Args:
        weights: the module's own parameters.
        args, kwargs: what it is called with.
    """
    with Products({"weight": weights["weight"]}) as products:
        functional_call(module, dict(weights), args, dict(kwargs))
    product = products.seen.get("weight")
    if product is None or product.transposed:
        return False
    entered = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return torch.equal(product.input.flatten(), entered.flatten())


class Products(TorchFunctionMode):
    """Sees products of matrices with some weights while the body runs.

    Args:
        weights: by any names; those that are multiplied as they are, in this memory.
    """

    _OF: tuple[Callable[..., Any], ...] = (
        nn.functional.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.mm,
        torch.Tensor.mm,
    )

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}
        self.seen: dict[str, Product] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self._OF and len(args) > 1:
            x, weight = args[:2]
            name = self._names.get(weight.data_ptr())
            if name is not None and weight.ndim == 2:
                self.seen[name] = Product(x, output, func is not nn.functional.linear)
        return output


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one shape and equal but for rounding."""
    if a.shape != b.shape:
        return False
    return float((a - b).norm()) <= ACCURACY * max(float(b.norm()), 1e-12)
