"""The tensors of a model by layer."""

import re
from collections.abc import Iterable

from torch import Tensor

from mergekit_dam.coefficients.correction import Correction

_BLOCK = re.compile(r"\.(\d+)\.")


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: `block 3`, or its own name outside of blocks."""
    found = _BLOCK.search(name)
    return f"block {found[1]}" if found else name.removesuffix(".weight")


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> its tensors; blocks in order, and before them what stands outside."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(layer_of(name), []).append(name)
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(layer: str) -> tuple[int, str]:
    word, _, number = layer.partition(" ")
    return (int(number), "") if word == "block" else (-1, layer)


def squared_norm(correction: Correction) -> float:
    """The sum of squares of a correction, in fp64, without making the matrix of its factors."""
    lefts = [left.double() for left, _ in correction.pairs]
    rights = [right.double() for _, right in correction.pairs]
    full = None if correction.full is None else correction.full.double()
    total = 0.0 if full is None else _product(full, full)
    for left, right in zip(lefts, rights, strict=True):
        for other_left, other_right in zip(lefts, rights, strict=True):
            total += _product(left.mT @ other_left, right @ other_right.mT)
        if full is not None:
            total += 2 * _product(left.mT @ full, right)
    return total


def elements(correction: Correction) -> int:
    """Number of elements of the matrix that a correction adds."""
    if correction.full is not None:
        return correction.full.numel()
    left, right = correction.pairs[0]
    return left[..., 0].numel() * right.shape[-1]


def _product(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())
