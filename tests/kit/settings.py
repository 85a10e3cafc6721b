"""Settings of a merge, with everything off but for what a test changes."""

from collections.abc import Sequence
from typing import Any

from mergekit_dam.choices import CorrectionKind, ExpertFeed, Granularity, Objective
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.tensors import TensorSettings
from mergekit_dam.parameters import RunParameters

PLAIN: dict[str, Any] = {
    "nonlinearity": "none",
    "optimizer": "adamw",
    "mofo_fraction": 0.3,
    "learning_rate": 1e-2,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "steps": 10,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "max_grad_norm": 0.0,
}


def logits_settings(**changes: Any) -> RunParameters:
    """Parameters of the end-to-end objective with everything off, but for what is changed."""
    return RunParameters(**{**PLAIN, **changes})


def run_settings(
    holdout: float = 0.25, objective: Objective = "layer", **changes: Any
) -> RunParameters:
    """Parameters of a whole merge."""
    fixed = {"holdout": holdout, "objective": objective, "metric": "identity", "seed": 0}
    return RunParameters(**{**PLAIN, **fixed, **changes})


def tensor_settings(
    count: int,
    *,
    base: int | None = None,
    sum_to_one: bool = True,
    ridge: float = 1e-3,
    granularity: Granularity = "column",
    loss_weights: Sequence[float] | None = None,
    embeddings: bool = True,
    norms: bool = True,
    head: bool = True,
    experts: ExpertFeed = "routed",
    correction: CorrectionKind = "none",
    correction_rank: int = 64,
) -> TensorSettings:
    """Settings of the tensors of `count` sources."""
    return TensorSettings(
        parametrisation=Parametrisation.create(
            [1.0] * count, base=base, include_base=False, sum_to_one=sum_to_one
        ),
        loss_weights=tuple(loss_weights or [1.0] * count),
        ridge=ridge,
        granularity=granularity,
        correction=correction,
        correction_rank=correction_rank,
        embeddings=embeddings,
        norms=norms,
        head=head,
        experts=experts,
    )
