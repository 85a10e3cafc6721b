"""Whether a saved correction fits a tensor."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from mergekit_dam.coefficients.correction import FIELDS

Shapes = Mapping[str, Sequence[int]]
"""Field of a correction -> shape."""


def stored_shapes(path: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes in a file of corrections: output tensor's name -> field -> shape.

    Raises:
        SafetensorError: The file is damaged.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    with safe_open(path, framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 (not a mapping)
            name, _, field = key.rpartition(".")
            found.setdefault(name, {})[field] = tuple(handle.get_slice(key).get_shape())
    return found


def correction_problem(shapes: Shapes, weight: Sequence[int], axis: int = -1) -> str | None:
    """The problem with the correction of a weight; None if there is none.

    Args:
        shapes: Shapes of the correction's tensors by field.
        weight: Shape of the weight; fused experts come first.
        axis: Input dimension of the weight.
    """
    unknown = sorted(set(shapes) - set(FIELDS))
    if unknown:
        return f"its correction has `{unknown[0]}`, which is none of {', '.join(FIELDS)}"
    if len(weight) < 2:
        return f"it has a correction, but is no matrix (its shape is {list(weight)})"
    *experts, out, columns = weight
    if axis % len(weight) != len(weight) - 1:
        out, columns = columns, out
    if "full" in shapes and list(shapes["full"]) != [*experts, out, columns]:
        return _required([*experts, out, columns], "full", shapes)
    for left, right in (("left", "right"), ("moved_left", "moved_right")):
        if left not in shapes and right not in shapes:
            continue
        if left not in shapes or right not in shapes:
            missing = left if left not in shapes else right
            return f"its correction has one of the two factors alone: `{missing}` is missing"
        rank = shapes[left][-1] if shapes[left] else 0
        for field, required in ((left, [*experts, out, rank]), (right, [*experts, rank, columns])):
            if list(shapes[field]) != required:
                return _required(required, field, shapes)
    return None


def _required(shape: Sequence[int], field: str, shapes: Shapes) -> str:
    return (
        f"required a correction of shape {list(shape)}, got {list(shapes[field])} for `{field}`; "
        f"it belongs to a tensor of another shape"
    )
