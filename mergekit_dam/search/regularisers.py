"""Penalties of one tensor's coefficients `[models, n]`, fp32 or fp64 (arXiv 2410.08371).

Each penalty is differentiable, with a finite gradient everywhere. Penalties that compare models
are 0 if there is only one model. In the reference (arcee-ai/DAM) penalties apply to the learned
values before the nonlinearity, a merged base counts as one of the models, and biases are left out.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.parameters import RunParameters

ROWS = 256
"""Rows of a weight that are compared at a time; this bounds the fp64 copies."""


def penalty(
    coefficients: Mapping[str, Tensor],
    settings: RunParameters,
    column_weights: Mapping[str, Tensor],
) -> Tensor:
    """All configured penalties, each times its weight, summed over the tensors.

    Args:
        coefficients: tensor name -> `[models, n]`, differentiable.
        settings: weights of the penalties; 0 switches one off.
        column_weights: tensor name -> `[pairs, n]` of `column_weights`. Tensors that are not in it
            have no weighted overlap (in the reference: all but linears).

    Returns:
        A scalar; a constant 0 if all are off.
    """
    total = torch.zeros(())
    for name, values in coefficients.items():
        if settings.similarity:
            total = total + settings.similarity * similarity(values)
        if settings.l1:
            total = total + settings.l1 * l1(values)
        if settings.l2:
            total = total + settings.l2 * l2(values)
        if settings.overlap:
            total = total + settings.overlap * overlap(values)
        if settings.weighted_overlap and name in column_weights:
            shared = weighted_overlap(values, column_weights[name])
            total = total + settings.weighted_overlap * shared
    return total


def similarity(coefficients: Tensor) -> Tensor:
    """Mean over pairs of models of their vectors' cosine, which is 0 for a zero vector."""
    length = torch.linalg.vector_norm(coefficients, dim=1, keepdim=True)
    # A zero vector has no direction: dividing it by infinity removes it and its gradient.
    unit = coefficients / length.masked_fill(length == 0, torch.inf)
    first, second = _pairs(len(unit))
    return _mean((unit[first] * unit[second]).sum(1))


def l1(coefficients: Tensor) -> Tensor:
    """Sum over models of the 1-norms."""
    return coefficients.abs().sum()


def l2(coefficients: Tensor) -> Tensor:
    """Sum over models of the 2-norms (not squared), with gradient 0 at the zero vector."""
    lengths: Tensor = torch.linalg.vector_norm(coefficients, dim=1)
    return lengths.sum()


def overlap(coefficients: Tensor) -> Tensor:
    """Mean over pairs of models of `sum over n of min(|a|, |b|)`."""
    return _mean(_smaller(coefficients).sum(1))


def weighted_overlap(coefficients: Tensor, weights: Tensor) -> Tensor:
    """The overlap with each column weighted by `weights` `[pairs, n]` of `column_weights`."""
    return _mean((_smaller(coefficients) * weights.to(coefficients)).sum(1))


def column_weights(tensors: Sequence[Tensor], base: Tensor, *, axis: int = -1) -> Tensor:
    """How much each pair of models interferes in each column: `sin(2 theta)^2`.

    Theta is the angle between the columns of the two task vectors `W_i - W_base`. The weight is 1
    at 45 degrees, and 0 if the columns are parallel or orthogonal, or if one of them is zero.

    Args:
        tensors: a linear's weight `[out, in]` of every model (`[in, out]` with `axis` 0), any
            float dtype; borrowed.
        base: the weight of the base; borrowed.
        axis: the input dimension of the weights.

    Returns:
        fp64 `[pairs, in]`, in the order (0, 1), (0, 2), ..., (1, 2), ...
    """
    facing = [tensor.T if axis == 0 else tensor for tensor in (base, *tensors)]
    first, second = _pairs(len(tensors))
    columns = facing[0].shape[1]
    square = torch.zeros(len(tensors), columns, dtype=torch.float64, device=base.device)
    product = square.new_zeros(len(first), columns)
    for origin, *rows in zip(*(torch.split(tensor, ROWS) for tensor in facing), strict=True):
        deltas = [row.double() - origin.double() for row in rows]
        for total, delta in zip(square, deltas, strict=True):
            total += delta.square().sum(0)
        for total, i, j in zip(product, first.tolist(), second.tolist(), strict=True):
            total += (deltas[i] * deltas[j]).sum(0)
    lengths = square[first] * square[second]
    # sin(2t)^2 = 4 cos(t)^2 (1 - cos(t)^2); rounding may put a cosine above 1.
    cosine = product.square() / lengths.masked_fill(lengths == 0, torch.inf)
    return 4 * cosine * (1 - cosine).clamp_min(0)


def _pairs(models: int) -> tuple[Tensor, Tensor]:
    """Indices of the first and the second model of every pair."""
    first, second = torch.triu_indices(models, models, offset=1)
    return first, second


def _smaller(coefficients: Tensor) -> Tensor:
    """`min(|a|, |b|)` of every pair, `[pairs, n]`; equal values share the gradient."""
    first, second = _pairs(len(coefficients))
    return torch.minimum(coefficients[first].abs(), coefficients[second].abs())


def _mean(of_pairs: Tensor) -> Tensor:
    """The mean of `[pairs]`; 0 if there are no pairs."""
    return of_pairs.sum() / max(len(of_pairs), 1)
