"""The tensors of a model by layer."""

from collections.abc import Iterable

from mergekit_dam.coefficients.correction import Correction
from mergekit_dam.reports.names import place_of


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: `block 3`, or its own name outside of blocks."""
    found = place_of(name)
    return f"block {found.layer}" if found else name.removesuffix(".weight")


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> its tensors; blocks in order, and before them what stands outside."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(layer_of(name), []).append(name)
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(layer: str) -> tuple[int, str]:
    word, _, number = layer.partition(" ")
    return (int(number), "") if word == "block" else (-1, layer)


def elements(correction: Correction) -> int:
    """Number of elements of the matrix that a correction adds."""
    if correction.full is not None:
        return correction.full.numel()
    left, right = correction.pairs[0]
    return left[..., 0].numel() * right.shape[-1]
