"""Whether a saved correction fits a tensor."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from mergekit_dam.coefficients.correction import FIELDS, Corrections
from mergekit_dam.errors import ConfigError

Shapes = Mapping[str, Sequence[int]]
"""Field of a correction -> shape."""


def stored_shapes(path: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes in a file of corrections: output tensor's name -> field -> shape.

    Raises:
        SafetensorError: The file is damaged.
        ConfigError: A correction is not in fp32.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    with safe_open(path, framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 (not a mapping)
            name, _, field = key.rpartition(".")
            own = handle.get_slice(key)
            if own.get_dtype() != "F32":
                raise ConfigError(
                    f"{path}: required corrections in F32, got {own.get_dtype()} for {key}"
                )
            found.setdefault(name, {})[field] = tuple(own.get_shape())
    return found


def sound_corrections(path: Path) -> Corrections:
    """The corrections of a file, each of which is a matrix of some shape.

    Raises:
        ConfigError: One is none, or of another dtype than fp32.
    """
    for name, shapes in stored_shapes(path).items():
        weight = _weight_of(shapes)
        problem = correction_problem(shapes, weight)
        if problem is not None or not math.prod(weight):
            raise ConfigError(
                f"{path}: the correction of {name} is damaged ({problem or 'it is empty'}); name "
                f"the files of an intact merge"
            )
    return Corrections.of_file(path)


def _weight_of(shapes: Shapes) -> list[int]:
    """The shape of the weight that a correction seems to be of."""
    if "full" in shapes:
        return list(shapes["full"])
    left, right = (
        next((shapes[name] for name in names if name in shapes), ())
        for names in (("left", "moved_left"), ("right", "moved_right"))
    )
    return [*left[:-1], *right[-1:]]


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
