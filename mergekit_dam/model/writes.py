"""Measures which units write to the residual stream, and with what factor, by disturbing them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_dam.model.experts import ACCURACY
from mergekit_dam.model.hooks import After, copy_of, first_tensor, hooked
from mergekit_dam.model.units import Run, Unit, UnitCall, Write


def measure_writes(
    root: nn.Module,
    run: Run,
    units: dict[str, Unit],
    records: Mapping[str, UnitCall],
    source: Tensor,
) -> tuple[dict[str, Unit], float]:
    """Disturb one output at a time, with all other units fixed, and measure the effect at the end.

    Args:
        root: The part's module.
        run: Function that runs the part on the source.
        units: Units of the part, by name.
        records: Recorded input and output of each unit.
        source: Hidden states that enter the part; disturbed in place and restored.

    Returns:
        The units with their `write`, and the factor with which the part's input reaches its
        output directly.
    """
    outputs = {name: records[name].output for name in units if _is_leaf(root, name)}
    generator = torch.Generator(source.device).manual_seed(0)
    reference = _held_run(root, run, outputs)

    def disturbance(like: Tensor) -> Tensor:
        # At least as large as the part's output: the rounding there would hide a smaller effect.
        noise = torch.randn(like.shape, generator=generator, device=like.device)
        return noise * max(_size(like), _size(reference), 1e-3)

    measured = dict(units)
    for name, output in outputs.items():
        if not isinstance(output, Tensor) or output.numel() != reference.numel():
            continue
        by = disturbance(output)
        effect = _held_run(root, run, {**outputs, name: output + by}) - reference
        scale = _proportion(effect, by)
        if scale:
            measured[name] = replace(units[name], write=Write(scale))
    by = disturbance(source)
    source.add_(by)
    try:
        effect = _held_run(root, run, outputs) - reference
    finally:
        source.sub_(by)
    return _through_norms(measured, records), _proportion(effect, by)


def _held_run(root: nn.Module, run: Run, outputs: Mapping[str, Any]) -> Tensor:
    """The output of a part whose units return the given outputs."""

    def put_out(output: Any) -> After:
        return lambda *_: copy_of(output)

    with hooked(root, after={name: put_out(output) for name, output in outputs.items()}):
        leaving: Tensor = copy_of(first_tensor(run()))
    return leaving


def _through_norms(units: Mapping[str, Unit], records: Mapping[str, UnitCall]) -> dict[str, Unit]:
    """Units with the writes of linears whose output reaches the residual stream through a norm."""
    found = dict(units)
    for norm in units.values():
        if norm.write is None or norm.kind != "norm":
            continue
        for name, unit in units.items():
            made, entered = records[name].output, records[norm.name].input
            if unit.kind == "linear" and same_tensor(made, entered):
                found[name] = replace(unit, write=Write(norm.write.scale, norm.name))
    return found


def _is_leaf(root: nn.Module, name: str) -> bool:
    """Whether no submodule of a unit owns parameters: fixing its output then hides no unit."""
    children = root.get_submodule(name).named_modules()
    return not any(n and any(True for _ in m.parameters(recurse=False)) for n, m in children)


def _size(x: Tensor) -> float:
    """Root mean square."""
    return float(x.float().square().mean().sqrt())


def _proportion(effect: Tensor, cause: Tensor) -> float:
    """The factor s if `effect = s * cause` everywhere, else 0."""
    effect, cause = effect.reshape(-1).double(), cause.reshape(-1).double()
    scale = float(effect @ cause / (cause @ cause))
    deviation = float((effect - scale * cause).norm() / cause.norm())
    return scale if abs(scale) > ACCURACY and deviation < ACCURACY * abs(scale) else 0.0


def same_tensor(a: Any, b: Any) -> bool:
    """Whether both values are tensors, and equal."""
    return (
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    )
