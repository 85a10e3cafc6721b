"""Mixtures of experts: the input of the experts, and the run of a single expert on given tokens.

transformers keeps the experts of a block in one module. Its parameters `[experts, ., .]` hold one
slice per expert. It is called with hidden states, the experts that each token is sent to, and the
weights of these experts. Nothing else is assumed: the linears inside are found by running one
expert and watching for products with its slices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

ACCURACY = 1e-3
"""Relative deviation up to which two recorded fp32 results count as equal."""


class Routing(NamedTuple):
    """The arguments of a call of experts.

    Attributes:
        hidden: Hidden states `[tokens, hidden]`.
        experts: Indices of the experts that each token is sent to, int64 `[tokens, k]`.
        weights: Weights of these experts' outputs in their sum, `[tokens, k]`.
    """

    hidden: Tensor
    experts: Tensor
    weights: Tensor

    def weight_of(self, expert: int) -> Tensor:
        """The weight of an expert for each token, `[tokens]`; 0 if the token is not sent to it."""
        return (self.weights * (self.experts == expert)).sum(1)

    @classmethod
    def joined(cls, chunks: Sequence["Routing"]) -> "Routing":
        """The concatenation of chunks, in order."""
        return cls(*(torch.cat(tensors) for tensors in zip(*chunks, strict=True)))


@dataclass(frozen=True)
class FusedLinear:
    """A linear that every expert has.

    Attributes:
        parameter: Name of the fused weight.
        axis: Input dimension of the fused weight: -1 for `[experts, out, in]`, 1 if transposed.
    """

    parameter: str
    axis: int


class Product(NamedTuple):
    """Inputs `[tokens, in]` and outputs `[tokens, out]` of one linear of an expert.

    Where it is `transposed`, its weight is `[in, out]`.
    """

    input: Tensor
    output: Tensor
    transposed: bool


def routing_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Routing | None:
    """The routing that a module is called with, or None if this is not a call of experts."""
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
    """Run one expert on some tokens, and record the products of its linears.

    Args:
        module: Module of all experts.
        weights: The expert's slices of the module's parameters, by name.
        x: Hidden states `[tokens, hidden]`.

    Returns:
        Hidden states `[tokens, hidden]`, and the product with each slice, by name.
    """
    # All experts are views of this one, which take no memory; all tokens go to the first.
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
        weights: The module's own parameters.
        routing: Routing of a recorded call.
        output: Output of that call.

    Returns:
        The linears; none if the experts, run one by one, do not add up to the output.
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
    """Whether a module multiplies its input by its weight, whatever it does with the product.

    Args:
        weights: The module's own parameters.
        args, kwargs: Arguments of a recorded call.
    """
    with Products({"weight": weights["weight"]}) as products:
        functional_call(module, dict(weights), args, dict(kwargs))
    product = products.seen.get("weight")
    if product is None or product.transposed:
        return False
    entered = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return torch.equal(product.input.flatten(), entered.flatten())


class Products(TorchFunctionMode):
    """Records the products of matrices with some weights while the body runs.

    Args:
        weights: Weights by any names. They are recognised by their memory, so a product with a
            copy is not recorded.
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
    """Whether two tensors have the same shape and are equal up to rounding."""
    if a.shape != b.shape:
        return False
    return float((a - b).norm()) <= ACCURACY * max(float(b.norm()), 1e-12)
