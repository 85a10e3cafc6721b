"""The record of a merge: coefficients, reports, and the trials of a search."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction, Corrections
from mergekit_dam.coefficients.tensors import FittedTensor, TensorReport
from mergekit_dam.errors import DamError

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One step of the search for the best coefficients, judged on held-out data.

    Attributes:
        name: Name of the trial.
        kept: Whether it became the best so far.
        held_out_kl: KL from each model that has calibration data, in nats per token.
        mean_held_out_kl: Mean of these, weighted by the models' loss weights.
        seconds: Wall time.
        details: Further numbers, such as the number of steps.
        ended: Why it ended before it was done; empty if it was done.
        text_losses: Loss of the next token on each model's text, of the model itself and of the
            merged one, in nats per token; of the start alone.
    """

    name: str
    kept: bool
    held_out_kl: tuple[float, ...]
    mean_held_out_kl: float
    seconds: float
    details: Mapping[str, float] = field(default_factory=dict)
    ended: str = ""
    text_losses: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Trial":
        """The trial whose fields, as plain values, are these."""
        pairs = tuple((own, other) for own, other in state["text_losses"])
        return cls(**{**state, "held_out_kl": tuple(state["held_out_kl"]), "text_losses": pairs})


@dataclass(eq=False)  # tasks that carry one are hashed: by its identity
class MergeRecord:
    """The results of a merge so far. The record is small and is passed from stage to stage.

    Attributes:
        coefficients: Output tensor's name -> fp32 `[sources, n]` or `[sources, 1]`.
        axes: Output tensor's name -> dimension of its coefficients, if that is not the last.
        reports: Output tensor's name -> report of its fit.
        seconds: Stage -> wall time.
        trials: Trials of the search, if the whole model was judged.
        left_out: Sentences about what the search had no time for.
        corrections: Matrices that are added to merged weights, on disk; None where none can be.
    """

    coefficients: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    reports: dict[str, TensorReport] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    corrections: Corrections | None = None

    def correction(self, name: str) -> Correction | None:
        """The correction of an output tensor, if it has one."""
        return None if self.corrections is None else self.corrections.get(name)

    def without(self, names: Collection[str]) -> "MergeRecord":
        """A record of all other tensors."""

        def rest(known: dict[str, T]) -> dict[str, T]:
            return {name: value for name, value in known.items() if name not in names}

        return MergeRecord(rest(self.coefficients), rest(self.axes), rest(self.reports))

    @property
    def state(self) -> dict[str, Any]:
        """All of it for the journal: plain values, tensors, and the files of the corrections."""
        plain = {own.name: getattr(self, own.name) for own in fields(self)}
        return {
            **plain,
            "reports": {name: asdict(report) for name, report in self.reports.items()},
            "trials": [asdict(trial) for trial in self.trials],
            "corrections": None if self.corrections is None else self.corrections.state,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any], corrections: Corrections | None) -> "MergeRecord":
        """The record that had a state.

        Args:
            corrections: The same corrections, from the files in the state.
        """
        return cls(
            **{
                **state,
                "coefficients": {n: rows.clone() for n, rows in state["coefficients"].items()},
                "reports": {name: TensorReport(**own) for name, own in state["reports"].items()},
                "trials": [Trial.of_state(own) for own in state["trials"]],
                "corrections": corrections,
            }
        )

    def add(self, fitted: FittedTensor) -> None:
        """Record a tensor whose coefficients are final.

        Raises:
            DamError: If a coefficient or its correction is not finite.
        """
        name = fitted.sources.name
        coefficients = fitted.coefficients.cpu()
        correction = {} if fitted.correction is None else fitted.correction.tensors
        for what, tensor in {"coefficient": coefficients, **correction}.items():
            if not tensor.isfinite().all():
                raise DamError(
                    f"{name}: its fit made a {what} that is not finite; raise `ridge`, or give "
                    f"more calibration text"
                )
        self.coefficients[name] = coefficients
        self.reports[name] = fitted.report
        if fitted.axis != -1:
            self.axes[name] = fitted.axis
        if fitted.correction is not None:
            assert self.corrections is not None
            self.corrections.put(name, fitted.correction)
            size = float(torch.linalg.vector_norm(fitted.merged, dtype=torch.float32))
            said = {**fitted.report.correction, "weight_norm": size}
            self.reports[name] = replace(fitted.report, correction=said)
