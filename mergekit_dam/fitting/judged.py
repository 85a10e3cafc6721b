"""Keeps a fit only if its held-out loss is lower than that of the start."""

import math
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mergekit_dam.coefficients.tensors import FittedTensor, TensorReport, TensorSources
from mergekit_dam.errors import DamError
from mergekit_dam.fitting.evidence import Losses
from mergekit_dam.fitting.solver import Solution
from mergekit_dam.streams.distributed import from_first


def unfitted(
    sources: TensorSources, merged: Tensor, kind: str, outcome: str, *, axis: int = -1
) -> FittedTensor:
    """A tensor that keeps its weighted average `merged`, with the reason why it was not fitted."""
    report = TensorReport(sources.name, kind, outcome)
    return FittedTensor(sources, merged, sources.start(), axis, report)


def judged(
    sources: TensorSources,
    kind: str,
    candidate: Tensor,
    *,
    axis: int,
    before: Losses,
    after: Losses,
    solver: dict[str, Any],
    started: float,
) -> FittedTensor:
    """Keep the fit if its held-out loss is lower than that of the start, else keep the start.

    Args:
        candidate: Fitted coefficients fp32 `[sources, n]`.
        before, after: Losses of the start and of the fit.
        started: `time.perf_counter()` when the fit of this tensor began.

    Raises:
        DamError: The loss at the start is not finite.
    """
    if not _finite(before):
        raise DamError(
            f"{sources.name}: required a finite loss at the average of the models, got "
            f"{before.fit} on the text of the fit and {before.held_out} on held-out text; a "
            f"model's weights, or its hidden states on its calibration text, are not finite"
        )
    finite = _finite(after)
    kept = finite and after.held_out < before.held_out
    # Machines may differ in the last bits of a solution; all must continue with the same one.
    coefficients = from_first(lambda: (candidate if kept else sources.start()).cpu())
    report = TensorReport(
        name=sources.name,
        kind=kind,
        outcome="fitted" if kept else "start kept: held-out loss was not better",
        loss_start=before.fit,
        loss_fitted=after.fit if finite else None,
        held_out_start=before.held_out,
        held_out_fitted=after.held_out if finite else None,
        solver=solver,
        seconds=time.perf_counter() - started,
    )
    return FittedTensor(
        sources, sources.merged(coefficients, axis=axis), coefficients, axis, report
    )


def _finite(losses: Losses) -> bool:
    return math.isfinite((losses.fit or 0.0) + losses.held_out)


def judged_solution(
    sources: TensorSources,
    kind: str,
    solution: Solution,
    losses: Callable[[Tensor], Losses],
    *,
    axis: int = -1,
    started: float,
) -> FittedTensor:
    """Judge an exact fit by the losses of the tensor as it would be written.

    Args:
        solution: Solution for the unknowns of the sources' parametrisation.
        losses: Function from a merged tensor to its losses.
    """
    candidate = sources.settings.parametrisation.stepped(solution.step)
    return judged(
        sources,
        kind,
        candidate,
        axis=axis,
        before=losses(sources.merged(sources.start(), axis=axis)),
        after=losses(sources.merged(candidate, axis=axis)),
        solver=solution.statistics(),
        started=started,
    )
