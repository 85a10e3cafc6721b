"""Records inputs and outputs of modules while a model runs, and substitutes known outputs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mergekit_dam.model.experts import Routing, routing_of

Before: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any]], None]
"""Called with the positional and the keyword arguments of a module's call."""

After: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Any]
"""Called with these arguments and the output; if it returns a value, that replaces the output."""


class Stop(Exception):
    """Ends a forward pass early, once everything that was asked for is recorded."""


@contextlib.contextmanager
def until(stop: Stop) -> Iterator[None]:
    """End the body where this `Stop` is raised. Another one belongs to an outer forward pass."""
    try:
        yield
    except Stop as raised:
        if raised is not stop:
            raise
        # Its traceback holds the frames that raised it, and they hold the weights of the part.
        stop.__traceback__ = None


@contextlib.contextmanager
def hooked(
    root: nn.Module,
    *,
    before: Mapping[str, Before] | None = None,
    after: Mapping[str, After] | None = None,
) -> Iterator[None]:
    """Call hooks before and after modules run, until the body ends.

    Args:
        before, after: Path of a module below the root -> its hook.
    """
    handles = [
        root.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, hook=hook: hook(args, kwargs), with_kwargs=True
        )
        for name, hook in (before or {}).items()
    ]
    handles += [
        root.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, hook=hook: hook(args, kwargs, output),
            with_kwargs=True,
        )
        for name, hook in (after or {}).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced_forward(
    pairs: Iterable[tuple[nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    """Call other functions in place of the modules' own `forward` until the body ends."""
    modules = []
    try:
        for module, forward in pairs:
            module.forward = forward
            modules.append(module)
        yield
    finally:
        for module in modules:
            del module.forward


@dataclass
class Captured:
    """Inputs and outputs of units in one forward pass, by unit name.

    Attributes:
        routing: Routings of experts.
        precisions: Dtypes in which the outputs were computed.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, Routing] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    precisions: dict[str, torch.dtype] = field(default_factory=dict)


@contextlib.contextmanager
def capture(
    root: nn.Module,
    *,
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
    stop: bool = True,
) -> Iterator[Captured]:
    """Capture inputs and outputs of units while the body runs the part.

    They are fp32 copies, because some blocks later add to these tensors in place.

    Args:
        stop: Whether to end the forward pass as soon as everything is captured.
    """
    captured, enough = Captured(), Stop()

    def check() -> None:
        if stop and len(captured.inputs) == len(inputs) and len(captured.outputs) == len(outputs):
            raise enough

    def entering(name: str) -> Before:
        def hook(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            captured.inputs[name] = _fp32_copy(first_tensor((args, kwargs)))
            routing = routing_of(args, kwargs)
            if routing is not None:
                captured.routing[name] = Routing(*map(_fp32_copy, routing))
            check()

        return hook

    def leaving(name: str) -> After:
        def hook(_: Any, __: Any, output: Any) -> None:
            captured.outputs[name] = _fp32_copy(output)
            captured.precisions[name] = output.dtype
            check()

        return hook

    before = {name: entering(name) for name in inputs}
    after = {name: leaving(name) for name in outputs}
    with until(enough), hooked(root, before=before, after=after):
        yield captured


@contextlib.contextmanager
def watch(root: nn.Module, outputs: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of units, to take gradients by them, while the body runs the part.

    Later modules get copies, because some blocks later add to these tensors in place.
    """
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> After:
        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            seen[name] = output
            return output.clone()

        return hook

    with hooked(root, after={name: hook_for(name) for name in outputs}):
        yield seen


@contextlib.contextmanager
def substitute(root: nn.Module, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """While the body runs the part, units return copies of known outputs and compute nothing."""
    with replaced_forward(
        (root.get_submodule(name), lambda *_, output=output, **__: output.clone())
        for name, output in outputs.items()
    ):
        yield


def copy_of(value: Any) -> Any:
    """A copy of a tensor; any other value unchanged."""
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


def own_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and buffers that a module itself owns."""
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return tuple(name for name, _ in named)
