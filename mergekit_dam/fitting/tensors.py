"""One output tensor on its way through the fit: its sources, and what became of it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients import merge_weights
from mergekit_dam.distributed import from_first
from mergekit_dam.errors import DamError
from mergekit_dam.fitting.moments import Losses
from mergekit_dam.fitting.solver import Solution
from mergekit_dam.settings import TensorSettings


@dataclass(frozen=True)
class TensorSources:
    """One tensor of every source, as loaded, and how it is to be merged.

    Attributes:
        name: of the output tensor.
        tensors: of each source; borrowed, of one shape and device.
        settings: how it is fitted.
        dtype: in which it is written.
        teachers: what each source's own model runs on, where that is not what is merged of it.
    """

    name: str
    tensors: Sequence[Tensor]
    settings: TensorSettings
    dtype: torch.dtype
    teachers: Sequence[Tensor] | None = None

    def merged(self, coefficients: Tensor, *, axis: int = -1) -> Tensor:
        """The tensor as written: `merge_weights`, then the one cast."""
        return merge_weights(self.tensors, coefficients, axis=axis).to(self.dtype)

    def teacher(self, source: int) -> Tensor:
        """The tensor that a source's own model runs on, fp32."""
        return (self.teachers or self.tensors)[source].float()

    def start(self) -> Tensor:
        """Coefficients fp32 `[sources, 1]` of the weighted average."""
        return self.settings.parametrisation.starting_coefficients()

    def of_expert(self, expert: int) -> "TensorSources":
        """One expert's slice of a fused tensor."""
        own, teachers = (
            None if tensors is None else [tensor[expert] for tensor in tensors]
            for tensors in (self.tensors, self.teachers)
        )
        assert own is not None
        name = f"{self.name}[{expert}]"
        return replace(self, name=name, tensors=own, teachers=teachers)

    @property
    def identical(self) -> bool:
        """All that are merged agree, and no coefficients of this form can change that."""
        form = self.settings.parametrisation
        if not form.sums_to_one:
            return False
        first, *others = (self.tensors[source] for source in form.reached)
        return all(torch.equal(first, other) for other in others)

    @property
    def alone(self) -> bool:
        """One source is all that is merged."""
        return len(self.settings.parametrisation.reached) == 1


@dataclass(frozen=True)
class TensorReport:
    """How the fit of one tensor went.

    Losses are fractions of the energy of what the teachers put out (for the head: nats per
    token), averaged over the models with their loss weights.

    Attributes:
        outcome: "fitted", or why the tensor keeps its starting coefficients.
        experts: of a fused tensor, those that keep them: by the reason why.
    """

    name: str
    kind: str
    outcome: str
    loss_start: float | None = None
    loss_fitted: float | None = None
    held_out_start: float | None = None
    held_out_fitted: float | None = None
    solver: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    experts: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedTensor:
    """A merged tensor with the coefficients that made it.

    Attributes:
        merged: in the dtype it is written in.
        coefficients: fp32 `[sources, n]` or `[sources, 1]`.
        axis: the dimension of the tensor that coefficients run along.
    """

    sources: TensorSources
    merged: Tensor
    coefficients: Tensor
    axis: int
    report: TensorReport


def unfitted(
    sources: TensorSources, merged: Tensor, kind: str, outcome: str, *, axis: int = -1
) -> FittedTensor:
    """The weighted average as merged before, with the reason why it was not fitted."""
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
    """Keep the fit, or fall back to the start where held-out data likes that better.

    Args:
        candidate: fitted coefficients fp32 `[sources, n]`.
        started: `time.perf_counter()` when the fit of this tensor began.

    Raises:
        DamError: the loss at the start is not finite.
    """
    if not math.isfinite(before.fit + before.held_out):
        raise DamError(
            f"{sources.name}: required a finite loss at the average of the models, got "
            f"{before.fit} ({before.held_out} on held-out text); a model's weights, or what it "
            f"makes of its calibration text, are not finite"
        )
    finite = math.isfinite(after.fit + after.held_out)
    kept = finite and after.held_out < before.held_out
    # Machines may differ in the last bits of a solution; the merged model must not.
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
        solution: step of the unknowns of the sources' parametrisation.
        losses: of a merged tensor.
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
