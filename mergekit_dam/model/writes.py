"""TODO mergekit_dam/model/writes.py."""

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
    """Disturb one output at a time, with every other unit held, and see what reaches the end."""
    held = [name for name in units if _is_leaf(root, name)]
    generator = torch.Generator(source.device).manual_seed(0)

    def held_run(disturbed: str | None, by: Tensor | None) -> Tensor:
        def put_out(name: str) -> After:
            value = records[name].output
            value = value + by if name == disturbed else value
            return lambda *_: copy_of(value)

        with hooked(root, after={name: put_out(name) for name in held}):
            output: Tensor = copy_of(first_tensor(run()))
        return output

    reference = held_run(None, None)
    smallest = max(_size(reference), 1e-3)

    def disturbance(like: Tensor) -> Tensor:
        # No smaller than the part's output, in whose rounding its effect would be lost.
        noise = torch.randn(like.shape, generator=generator, device=like.device)
        return noise * max(_size(like), smallest)

    measured = dict(units)
    for name in held:
        output = records[name].output
        if not isinstance(output, Tensor) or output.numel() != reference.numel():
            continue
        by = disturbance(output)
        scale = _proportion(held_run(name, by) - reference, by)
        if scale:
            measured[name] = replace(units[name], write=Write(scale))
    for norm in [unit for unit in measured.values() if unit.write and unit.kind == "norm"]:
        for name, unit in measured.items():
            if unit.kind == "linear" and same_tensor(
                records[name].output, records[norm.name].input
            ):
                assert norm.write is not None
                measured[name] = replace(unit, write=Write(norm.write.scale, norm.name))
    by = disturbance(source)
    source.add_(by)
    try:
        effect = held_run(None, None) - reference
    finally:
        source.sub_(by)
    return measured, _proportion(effect, by)


def _is_leaf(root: nn.Module, name: str) -> bool:
    """A unit none of whose submodules owns parameters: holding it hides no other unit."""
    children = root.get_submodule(name).named_modules()
    return not any(n and any(True for _ in m.parameters(recurse=False)) for n, m in children)


def _size(x: Tensor) -> float:
    """Root mean square."""
    return float(x.float().square().mean().sqrt())


def _proportion(effect: Tensor, cause: Tensor) -> float:
    """s if effect = s * cause throughout, else 0."""
    effect, cause = effect.reshape(-1).double(), cause.reshape(-1).double()
    scale = float(effect @ cause / (cause @ cause))
    deviation = float((effect - scale * cause).norm() / cause.norm())
    return scale if abs(scale) > ACCURACY and deviation < ACCURACY * abs(scale) else 0.0


def same_tensor(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    )
