"""The structure of a part of a model, found by running the part.

The names of modules play no role. Every module that owns weights is a unit. Its kind (linear,
norm, embedding) is tested on its recorded output. Linears share an input if their recorded
inputs are equal. The factor with which a unit adds to the residual stream is measured: all units
are fixed at their recorded outputs, one output is disturbed, and the change of the part's output
is compared with the disturbance.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_dam.model.experts import close, fused_linears, makes_logits, routing_of
from mergekit_dam.model.hooks import After, copy_of, first_tensor, hooked
from mergekit_dam.model.units import Anatomy, Run, Unit, UnitCall, grouped
from mergekit_dam.model.writes import measure_writes, same_tensor


def scattered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a little noise, so that no two weights are equal and none is zero."""
    scattered = {}
    for index, (name, weight) in enumerate(weights.items()):
        generator = torch.Generator(weight.device).manual_seed(index)
        noise = torch.randn(weight.shape, generator=generator, device=weight.device)
        size = weight.norm() / max(weight.numel(), 1) ** 0.5  # root mean square
        scattered[name] = noise.mul_(0.1 * size.clamp_min(0.01)).add_(weight)
    return scattered


@torch.no_grad()
def examine(
    root: nn.Module, run: Run, weights: Mapping[str, Tensor], source: Tensor | None = None
) -> Anatomy:
    """Find the anatomy of a part.

    Args:
        root: The part's module.
        run: Function that runs the part on a small input (a few tokens) and returns its output.
        weights: Weights that `run` uses, by names relative to `root`, fp32. They should be
            `scattered`, because two norms with equal weights look like one.
        source: Hidden states that `run` passes to the part, if the part has a residual stream.
            They are disturbed in place and restored.
    """
    owners = {}
    for name, module in root.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        own += [n for n in module._buffers if (f"{name}.{n}" if name else n) in weights]
        if any((f"{name}.{n}" if name else n) in weights for n in own):
            owners[name] = tuple(own)
    records = _record(root, run, owners)
    units = {
        name: _classify(name, root.get_submodule(name), owners[name], record, weights)
        for name, record in records.items()
    }
    residual_scale = 0.0
    if source is not None:
        for name in _of_some_tokens(root, owners, records, source[..., 0].numel()):
            units[name] = Unit(name, "other", owners[name])
        units, residual_scale = measure_writes(root, run, units, records, source)
    met = [(unit, records[name].input) for name, unit in units.items()]
    return Anatomy(grouped(met, same_tensor), residual_scale)


def _of_some_tokens(
    root: nn.Module, owners: Mapping[str, Any], records: Mapping[str, UnitCall], tokens: int
) -> list[str]:
    """Names of the units that see only some tokens, and of their neighbours in one module list.

    These are single experts. Routing decides which tokens they see, so the outputs of the teacher
    and of the merged model belong to different tokens.
    """
    lists = [name for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    partly = [
        name
        for name in owners
        if name not in records
        or not isinstance(x := records[name].input, Tensor)
        or (x.numel() // max(1, x.shape[-1])) % tokens
    ]
    around = [own for own in lists if any(name.startswith(f"{own}.") for name in partly)]
    return [
        name
        for name in records
        if name in partly or any(name.startswith(f"{own}.") for own in around)
    ]


def _record(root: nn.Module, run: Run, owners: Mapping[str, Any]) -> dict[str, UnitCall]:
    """Run once and record, in call order, the input and output of every owner of parameters."""
    records: dict[str, UnitCall] = {}

    def hook_for(name: str) -> After:
        def hook(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if name in records:
                records[name].calls += 1
            else:
                entered = copy_of(first_tensor((args, kwargs)))
                records[name] = UnitCall(1, entered, copy_of(output), (args, kwargs))

        return hook

    with hooked(root, after={name: hook_for(name) for name in owners}):
        run()
    return records


def _classify(
    name: str,
    module: nn.Module,
    parameters: tuple[str, ...],
    record: UnitCall,
    weights: Mapping[str, Tensor],
) -> Unit:
    """Determine the kind of a unit from the recorded output of its module."""
    other = Unit(name, "other", parameters)
    x, y = record.input, record.output
    own = {p: weights[other.parameter(p)] for p in parameters if other.parameter(p) in weights}
    weight = own.get("weight")
    if record.calls != 1 or x is None or len(own) != len(parameters):
        return other
    routing = routing_of(*record.call)
    if routing is not None:
        linears = fused_linears(module, own, routing, y)
        return replace(other, kind="experts", linears=linears) if linears else other
    if isinstance(y, tuple) and weight is not None and x.is_floating_point():
        routes = makes_logits(module, own, *record.call)
        return replace(other, kind="router") if routes else other
    if not set(parameters) <= {"weight", "bias"} or weight is None:
        return other
    if not isinstance(y, Tensor):
        return other
    if not x.is_floating_point():  # token ids
        found = weight.ndim == 2 and y.shape[-1] == weight.shape[1]
        return replace(other, kind="embedding", axis=-1) if found else other
    if weight.ndim == 2:
        bias = own.get("bias", weight.new_zeros(()))
        for axis, matrix in ((-1, weight.T), (0, weight)):
            if matrix.shape == (x.shape[-1], y.shape[-1]) and close(x @ matrix + bias, y):
                return replace(other, kind="linear", axis=axis)
        return other
    if weight.ndim == 1 and weight.shape[0] == y.shape[-1] and y.shape == x.shape:
        gain = _unit_gain(module, x, y, own)
        return other if gain is None else replace(other, kind="norm", unit_gain=gain)
    return other


def _unit_gain(module: nn.Module, x: Tensor, y: Tensor, own: Mapping[str, Tensor]) -> float | None:
    """The gain g of `y = (w + g) * n(x) + b`, or None if the module does not have this form."""
    try:
        with_zero, normalised = norm_parts(module, x, own)
    except (RuntimeError, TypeError, AttributeError):  # a module with more inputs (a gate)
        return None
    gain = float((with_zero * normalised).sum() / normalised.square().sum().clamp_min(1e-30))
    bias = own.get("bias", x.new_zeros(()))
    expected = (own["weight"] + round(gain)) * normalised + bias
    return float(round(gain)) if close(expected, y) else None


def norm_parts(module: nn.Module, x: Tensor, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The output of a norm at weight 0, and the factor `n(x)` of its weight, both without bias."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    at_zero = functional_call(module, zeros, (x,))
    at_one = functional_call(module, {**zeros, "weight": torch.ones_like(own["weight"])}, (x,))
    return at_zero, at_one - at_zero
