"""Merged tensors from coefficients, and the gradient of coefficients.

A merged weight is `W = sum_s c_s * W_s` over the sources s (the models, and the base if there is
one), with one coefficient per source and input column (arXiv 2410.08371).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction

_PIECE = 2**22
"""Elements of a weight that are processed at a time."""


def merge_weights(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    *,
    axis: int = -1,
    correction: Correction | None = None,
    as_written: bool = True,
) -> Tensor:
    """Merge one tensor of every source; the fit and the writer both call this.

    Args:
        tensors: One tensor per source, all of one shape and device; borrowed.
        coefficients: fp32 `[sources, n]` with n the tensors' size along `axis`, or
            `[sources, 1]` for one coefficient per source. For fused experts `[experts, ., .]` it
            may be `[sources, experts * n]`: the coefficients of one expert after the other.
        axis: Input dimension of the weight.
        correction: Matrix that is added to the weight, if there is one.
        as_written: As for `Correction.add_to`.

    Returns:
        fp32 tensor of the sources' shape. A source whose coefficients are all zero is left
        out, so that one-hot coefficients return the source bit for bit.
    """
    like = tensors[0]
    shape = _facing(coefficients.shape[1], like.shape, axis)
    scales = [
        coefficient.to(device=like.device, dtype=torch.float32).reshape(shape).expand(like.shape)
        for coefficient in coefficients
    ]
    taking_part = [
        (tensor, scale)
        for tensor, scale, coefficient in zip(tensors, scales, coefficients, strict=True)
        if coefficient.any()
    ]
    merged = torch.zeros_like(like, dtype=torch.float32)
    for rows in _pieces(like):
        for index, (tensor, scale) in enumerate(taking_part):
            if index == 0:  # not added to 0.0, which would turn -0.0 into 0.0
                merged[rows] = tensor[rows].float() * scale[rows]
            else:
                merged[rows].addcmul_(tensor[rows].float(), scale[rows])
    if correction is not None:
        correction.add_to(merged, axis=axis, as_written=as_written)
    return merged


def _pieces(tensor: Tensor) -> Iterator[Any]:
    """Yield indices of rows that are processed at a time, so that fp32 copies stay small."""
    if tensor.ndim == 0:
        yield ...
        return
    rows = max(1, _PIECE // max(1, tensor[:1].numel()))
    for first in range(0, len(tensor), rows):
        yield slice(first, first + rows)


def column_counts(shape: Sequence[int], axis: int = -1) -> tuple[int, ...]:
    """Allowed numbers of coefficients per source: 1, one per column, or one per expert and column.

    Args:
        shape: Shape of the tensor; the first of three dimensions is that of the experts.
        axis: Input dimension.
    """
    if not shape:
        return (1,)
    columns = shape[axis]
    return (1, columns, shape[0] * columns) if len(shape) == 3 else (1, columns)


def column_problem(count: int, shape: Sequence[int], axis: int = -1) -> str | None:
    """The problem with `count` coefficients per source for a tensor; None if there is none.

    Args:
        count: Number of coefficients per source.
        shape, axis: As in `column_counts`.
    """
    allowed = column_counts(shape, axis)
    if count in allowed:
        return None
    return (
        f"required {allowed[-1]} coefficients per source, or 1, got {count}; they belong to a "
        f"tensor of another shape than {list(shape)}"
    )


def _facing(count: int, shape: Sequence[int], axis: int) -> list[int]:
    """Shape that broadcasts `count` coefficients along `axis`."""
    facing = [1] * len(shape)
    if shape:
        facing[axis] = -1
    if len(shape) == 3 and count not in (1, shape[axis]):
        facing[0] = shape[0]
    return facing


def coefficient_gradient(
    tensors: Sequence[Tensor], gradient: Tensor, *, axis: int = -1, per_column: bool
) -> Tensor:
    """Turn the gradient of a merged tensor into the gradient of its coefficients.

    `dL/dc_s = sum over rows of W_s * dL/dW`; thus no autograd graph has to hold N models.

    Args:
        tensors: One tensor per source, as for `merge_weights`.
        gradient: Gradient of the merged tensor, in the tensors' shape.
        axis: Input dimension of the weight.
        per_column: One coefficient per column (of every expert) if True, else one per tensor.

    Returns:
        fp64 `[sources, n]`, or `[sources, 1]`.
    """
    if per_column and gradient.ndim == 3:
        experts = zip(*tensors, gradient, strict=True)
        return torch.cat(
            [
                coefficient_gradient(own, of_expert, axis=expert_axis(axis), per_column=True)
                for *own, of_expert in experts
            ],
            dim=1,
        )
    size = gradient.shape[axis] if per_column and gradient.ndim else 1
    # With columns last, the sum goes over a few rows at a time, so that products take no memory.
    turned = gradient.movedim(axis, -1).reshape(-1, size) if size > 1 else gradient.reshape(-1, 1)
    result = torch.zeros(len(tensors), size, dtype=torch.float64, device=gradient.device)
    for row, tensor in zip(result, tensors, strict=True):
        facing = tensor.movedim(axis, -1).reshape(-1, size) if size > 1 else tensor.reshape(-1, 1)
        rows = max(1, _PIECE // size)
        for w, g in zip(torch.split(facing, rows), torch.split(turned, rows), strict=True):
            row += (w.float() * g).sum(0)  # fp32 within a piece, fp64 over the pieces
    return result


def expert_axis(axis: int) -> int:
    """The dimension of one expert's slice that is `axis` of the fused tensor."""
    return axis - 1 if axis > 0 else axis


def rows_of_expert(coefficients: Tensor, shape: Sequence[int], axis: int, expert: int) -> Tensor:
    """The coefficients of one expert's slice of a fused tensor: `[sources, n]` or `[sources, 1]`.

    Args:
        coefficients: Coefficients of the fused tensor, as for `merge_weights`.
        shape, axis: Shape and input dimension of the fused tensor.
        expert: Index of the expert.
    """
    columns = shape[axis]
    if coefficients.shape[1] in (1, columns):
        return coefficients
    return coefficients[:, expert * columns : (expert + 1) * columns]
