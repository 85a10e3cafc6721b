"""The arguments that a model passes to each block besides hidden states, recorded and checked.

A block can run by itself only if these arguments are the same for every text.
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
    """The arguments of each block for `batch` sequences of `length` tokens.

    They are recorded twice, with different text and different weights outside the blocks.

    Raises:
        ArchitectureError: An argument besides the hidden states depends on the text (per-layer
            inputs) or can carry data between blocks (cross-layer caches), or the input of a block
            is not the output of the block before.
    """
    (first, chained), (second, _) = (
        _record(skeleton, torch.full((batch, length), number, device=device), number)
        for number in (0, 1)
    )
    name = skeleton.class_name
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if not _same((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs))):
            raise ArchitectureError(
                f"block {index} of {name} receives an argument besides hidden states that "
                f"depends on the text, or on weights outside the block; dam cannot run its "
                f"blocks one by one. {OTHER_METHODS}"
            )
        for value in (*a.args, *a.kwargs.values()):
            if not _is_constant(value):
                raise ArchitectureError(
                    f"block {index} of {name} receives a {type(value).__name__}, in which a block "
                    f"can leave something for other blocks (such as a shared cache); dam cannot "
                    f"run its blocks one by one. {OTHER_METHODS}"
                )
    if chained < len(skeleton.blocks):
        raise ArchitectureError(
            f"the input of block {chained} of {name} is not the output of block {chained - 1}; "
            f"dam cannot run its blocks one by one. {OTHER_METHODS}"
        )
    return first


def probe_weights(skeleton: Skeleton, number: int, device: torch.device) -> dict[str, Tensor]:
    """Weights outside the blocks that give every token a different embedding.

    Every row is filled with its number (from 1) plus `number`, as a view of one column.
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
    """Record the arguments of every block, and whether the blocks form a chain.

    Args:
        number: Offset of the weights outside the blocks.

    Returns:
        The arguments, and the index of the first block whose input is not the output of the
        block before (the number of blocks if there is none).
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
        # Each block's output is different, so that the input of the next one shows its origin.
        left.append(hidden + len(calls) if isinstance(hidden, Tensor) else hidden)
        return skeleton.wrap(left[-1])

    weights = probe_weights(skeleton, number, tokens.device)
    with until(enough):
        skeleton.run(weights, tokens, [record] * len(skeleton.blocks))
    pairs = zip(left, entered[1:], strict=False)
    broken = (i for i, (a, b) in enumerate(pairs, 1) if not _same(a, b))
    return tuple(calls), next(broken, len(calls))


def _same(a: Any, b: Any) -> bool:
    """Whether nested call arguments are equal; tensors are compared by value."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(type(a) is type(b) and (a == b or not _is_constant(a)))


def _is_constant(value: Any) -> bool:
    """Whether an argument is of a kind in which a block cannot leave anything."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype))
