"""The fit of a norm `y = (w + gain) * n(x) + b`, with N unknowns per feature."""

import time

import torch

from mergekit_dam.coefficients.tensors import FittedTensor, TensorSources
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.features import FeatureMoments
from mergekit_dam.fitting.judged import judged_solution
from mergekit_dam.fitting.linear import Residual, fit_bias
from mergekit_dam.fitting.solver import solve_small


def fit_norm(
    weight: TensorSources, bias: TensorSources | None, evidence: Evidence[FeatureMoments]
) -> list[FittedTensor]:
    """Fit the weight of a norm and, after it, its bias.

    The data determines only the merged value of a feature. Among the coefficients that give this
    value, the ridge picks those nearest to the start.

    Returns:
        The fitted weight and, where there is one, the fitted bias.
    """
    started = time.perf_counter()
    (moments,) = evidence.fit
    form = weight.settings.parametrisation
    bias_start = None if bias is None else bias.merged(bias.start())

    reaction = moments.n_y - moments.n_square * form.average(weight.tensors)
    if bias_start is not None:
        reaction -= bias_start.double() * moments.n_sum
    directions = form.directions(weight.tensors).T
    matrix = moments.n_square[:, None, None] * directions[:, :, None] * directions[:, None, :]
    rhs = reaction[:, None] * directions
    if weight.settings.granularity == "tensor":
        matrix, rhs = matrix.sum(0, keepdim=True), rhs.sum(0, keepdim=True)
    solution = solve_small(matrix, rhs, weight.settings.ridge)

    fitted = judged_solution(
        weight,
        "norm",
        solution,
        lambda merged: evidence.losses(merged, bias_start),
        started=started,
    )
    if bias is None:
        return [fitted]
    residual = moments.y_sum - torch.mul(fitted.merged.double(), moments.n_sum)
    return [fitted, fit_bias(bias, [Residual(residual, moments.count)], fitted.merged, evidence)]
