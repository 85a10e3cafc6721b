"""Modules watched while a model runs, and made to put out what is known already."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_dam.model.experts import Routing, routing_of


class Stop(Exception):
    """Ends a forward pass once all that was asked for is captured."""


@dataclass
class Captured:
    """Inputs and outputs of units, by unit name, of one forward pass; of experts, the routing."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, Routing] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def capture(
    root: nn.Module,
    *,
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
    stop: bool = True,
) -> Iterator[Captured]:
    """Capture inputs and outputs of units while the body runs the part.

    They are copies, fp32: some blocks add to these tensors in place later on.

    Args:
        stop: end the forward pass as soon as everything asked for was captured.
    """
    captured = Captured()
    handles = []

    def check() -> None:
        if stop and len(captured.inputs) == len(inputs) and len(captured.outputs) == len(outputs):
            raise Stop

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.inputs[name] = _fp32_copy(first_tensor((args, kwargs)))
            routing = routing_of(args, kwargs)
            if routing is not None:
                captured.routing[name] = Routing(*map(_fp32_copy, routing))
            check()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            captured.outputs[name] = _fp32_copy(output)
            check()

        return hook

    for name in inputs:
        module = root.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
    for name in outputs:
        handles.append(root.get_submodule(name).register_forward_hook(after(name)))
    try:
        with contextlib.suppress(Stop):
            yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watch(root: nn.Module, outputs: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Hold on to the outputs of units, for gradients by them, while the body runs the part.

    What follows gets copies, since some blocks add to these tensors in place later on.
    """
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen[name] = output
            return output.clone()

        return hook

    handles = [root.get_submodule(name).register_forward_hook(hook_for(name)) for name in outputs]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def substitute(root: nn.Module, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """While the body runs the part, units put out copies of what is known, without computing."""
    modules = [root.get_submodule(name) for name in outputs]
    for module, output in zip(modules, outputs.values(), strict=True):
        module.forward = lambda *_, output=output, **__: output.clone()
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def copy_of(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def _fp32_copy(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else copy_of(value)


def first_tensor(value: Any) -> Any:
    """The first tensor in nested call arguments, or None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    for item in value:
        found = first_tensor(item)
        if found is not None:
            return found
    return None
