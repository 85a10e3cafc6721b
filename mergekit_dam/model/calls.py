"""What the model passes to each block besides hidden states, recorded and checked.

A block can run by itself only if this is the same for every text.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.build import OTHER_METHODS
from mergekit_dam.model.hooks import Stop, until
from mergekit_dam.model.skeleton import BlockCall, Skeleton


def block_calls(
    skeleton: Skeleton, batch: int, length: int, device: torch.device
) -> tuple[BlockCall, ...]:
    """What each block is called with for `batch` sequences of `length` tokens.

    It is recorded twice, on other text and with other weights outside of the blocks.

    Raises:
        ArchitectureError: a block is handed something that depends on the text, beyond hidden
            states (cross-layer caches, per-layer inputs).
    """
    (first, chained), (second, _) = (
        _record(skeleton, torch.full((batch, length), number, device=device), number)
        for number in (0, 1)
    )
    name = skeleton.class_name
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if not _same((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs))):
            raise ArchitectureError(
                f"block {index} of {name} is handed more than hidden states that depends on the "
                f"text, or on weights outside of it; dam cannot run its blocks one by one. "
                f"{OTHER_METHODS}"
            )
        for value in (*a.args, *a.kwargs.values()):
            if not _is_constant(value):
                raise ArchitectureError(
                    f"block {index} of {name} is handed a {type(value).__name__}, in which blocks "
                    f"can leave something for others (a shared cache, say); dam cannot run them "
                    f"one by one. {OTHER_METHODS}"
                )
    if chained < len(skeleton.blocks):
        raise ArchitectureError(
            f"what enters block {chained} of {name} is not what block {chained - 1} puts out; dam "
            f"cannot run its blocks one by one. {OTHER_METHODS}"
        )
    return first


def probe_weights(skeleton: Skeleton, number: int, device: torch.device) -> dict[str, Tensor]:
    """Weights outside the blocks that give every token an embedding of its own.

    Every row is filled with its number plus `number`: no memory beyond one column.
    """
    weights = {}
    for name, parameter in skeleton.model.named_parameters():
        if skeleton.names.block_of(name) is None:
            count = parameter.shape[0] if parameter.ndim else 1
            rows = torch.arange(1.0, 1.0 + count, device=device) + number
            shape = [-1, *[1] * (parameter.ndim - 1)] if parameter.ndim else []
            weights[name] = rows.reshape(shape).expand(parameter.shape)
    return weights


def _record(skeleton: Skeleton, tokens: Tensor, number: int) -> tuple[tuple[BlockCall, ...], int]:
    """What every block is called with, and how many are fed what the one before puts out.

    Args:
        number: the weights outside of the blocks differ by it.
    """
    calls: list[BlockCall] = []
    entered: list[Any] = []
    left: list[Any] = []
    enough = Stop()

    def record(hidden: Any, call: BlockCall) -> Any:
        calls.append(call)
        entered.append(hidden)
        if len(calls) == len(skeleton.blocks):
            raise enough
        left.append(hidden + len(calls) if isinstance(hidden, Tensor) else hidden)
        return skeleton.wrap(left[-1])

    weights = probe_weights(skeleton, number, tokens.device)
    with until(enough):
        skeleton.run(weights, tokens, [record] * len(skeleton.blocks))
    pairs = zip(left, entered[1:], strict=False)
    broken = (i for i, (a, b) in enumerate(pairs, 1) if not _same(a, b))
    return tuple(calls), next(broken, len(calls))


def _same(a: Any, b: Any) -> bool:
    """Equality of nested call arguments, tensors by value."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(type(a) is type(b) and (a == b or not _is_constant(a)))


def _is_constant(value: Any) -> bool:
    """Whether what a block is handed is of a kind that it cannot leave anything in."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype))
