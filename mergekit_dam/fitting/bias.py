"""The fit of a bias, once the weight beside it is merged: one scalar per model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.moments import Evidence, M
from mergekit_dam.fitting.solver import solve_small
from mergekit_dam.fitting.tensors import FittedTensor, TensorSources, judged_solution


@dataclass(frozen=True)
class Residual:
    """Targets less the weight's output, summed over the weighted tokens, fp64 `[n]`."""

    total: Tensor
    count: float
    metric: Metric = PLAIN
    scale: float = 1.0


def fit_bias(
    bias: TensorSources, residuals: Sequence[Residual], weight: Tensor, evidence: Evidence[M]
) -> FittedTensor:
    """Fit the bias of a linear or of a norm.

    Args:
        residuals: one for each of the evidence's moments.
        weight: the merged weight, in the form that the evidence judges.
    """
    started = time.perf_counter()
    form = bias.settings.parametrisation
    directions, average = form.directions(bias.tensors), form.average(bias.tensors)
    matrix = directions.new_zeros(len(directions), len(directions))
    rhs = directions.new_zeros(len(directions))
    for left in residuals:
        felt = left.scale * left.metric(directions.T)
        matrix += left.count * directions @ felt
        rhs += felt.T @ (left.total - left.count * average)
    solution = solve_small(matrix[None], rhs[None], bias.settings.ridge)
    return judged_solution(
        bias,
        "bias",
        solution,
        lambda merged: evidence.losses(weight, merged),
        started=started,
    )
