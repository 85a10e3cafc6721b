"""The fit of a bias, once the weight beside it is merged: one scalar per model."""

import time

from torch import Tensor

from mergekit_dam.fitting.moments import Evidence, M
from mergekit_dam.fitting.solver import solve_small
from mergekit_dam.fitting.tensors import FittedTensor, TensorSources, judged_solution


def fit_bias(
    bias: TensorSources, residual: Tensor, weight: Tensor, evidence: Evidence[M]
) -> FittedTensor:
    """Fit the bias of a linear or of a norm.

    Args:
        residual: targets less the weight's output, summed over the weighted tokens, fp64 `[n]`.
        weight: the merged weight, in the form that the evidence judges.
    """
    started = time.perf_counter()
    count = evidence.fit.count
    form = bias.settings.parametrisation
    directions = form.directions(bias.tensors)
    matrix = count * directions @ directions.T
    rhs = directions @ (residual - count * form.origin(bias.tensors))
    solution = solve_small(matrix[None], rhs[None], form.start, bias.settings.ridge)
    return judged_solution(
        bias,
        "bias",
        solution,
        lambda merged: evidence.losses(weight, merged),
        started=started,
    )
