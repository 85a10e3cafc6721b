"""What a part of a model is made of, found by watching it run.

Nothing here goes by names. Every module that owns weights is called a unit; what it is
(linear, norm, embedding) is tested on what it returns, which linears share an input is seen
from the inputs, and what a unit adds to the residual stream is measured: all units are held
to their recorded outputs, one output is disturbed, and the effect on the part's output is
compared with the disturbance.
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
    """Weights with a little noise, so that no two of a part coincide or vanish."""
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
        root: the part's module.
        run: runs the part on a small input (a few tokens) and returns its output.
        weights: the weights that `run` uses, by names relative to `root`, fp32. They should
            be `scattered`, lest two norms of equal weights look like one.
        source: the hidden states that `run` feeds, if the part has a residual stream; they
            are disturbed in place and put back.
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
    """Units that see some tokens only, and those in one list with them: single experts.

    What they are fed depends on the routing; teachers' and merged outputs are of other tokens.
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
    """Run once and keep, in call order, what every owner of parameters got and gave."""
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
    """Tell linear, norm and embedding from what the module returned."""
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
    if not x.is_floating_point():
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
    """The gain g of `y = (w + g) * n(x) + b`, or None if the module is not of this form."""
    try:
        with_zero, normalised = norm_parts(module, x, own)
    except (RuntimeError, TypeError, AttributeError):  # it takes more than one input (a gate)
        return None
    gain = float((with_zero * normalised).sum() / normalised.square().sum().clamp_min(1e-30))
    bias = own.get("bias", x.new_zeros(()))
    expected = (own["weight"] + round(gain)) * normalised + bias
    return float(round(gain)) if close(expected, y) else None


def norm_parts(module: nn.Module, x: Tensor, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A norm's output at weight 0, and `n(x)`, what its weight multiplies; both without bias."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    at_zero = functional_call(module, zeros, (x,))
    at_one = functional_call(module, {**zeros, "weight": torch.ones_like(own["weight"])}, (x,))
    return at_zero, at_one - at_zero
