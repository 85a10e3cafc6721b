"""Parameters of the end-to-end fit."""

from typing import Any, Literal

from pydantic import Field

from mergekit_dam import choices
from mergekit_dam.parameters.base import Parameters


def _penalty(what: str, when: str) -> Any:
    """The field of a penalty's weight; at 0 the penalty is off."""
    return Field(default=0.0, ge=0, description=f"Weight of {what} (0 = off). {when}")


class LogitsParameters(Parameters):
    """Parameters of the whole merge that only the end-to-end fit (`logits`) reads."""

    steps: int | None = Field(
        default=None,
        gt=0,
        description="Number of optimiser steps. Default: none where layer fits left less than "
        "a 20th of the start's KL; else 20 (10 if they gain nothing), and up to 400 more if those "
        "paid. Set it for a known cost.",
    )
    batch_size: int = Field(
        default=1, gt=0, description="Sequences per model in one gradient. More take more memory."
    )
    gradient_accumulation: int = Field(
        default=1, gt=0, description="Batches per step. Raise it if a larger one does not fit."
    )
    optimizer: Literal["adamw", "mofo"] = Field(
        default="adamw",
        description="AdamW without weight decay, or MoFO, which moves only the coefficients with "
        "the largest momentum in each step, to stay closer to the start.",
    )
    mofo_fraction: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Fraction of a model's coefficients in a tensor that `mofo` moves per step. "
        "Lower it to stay closer to the start.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak of the learning rate; factors have a 50th. Default: 0.1, or 0.01 with "
        "`sum_to_one: false`; at most half beside factors. Lower it if the losses jump.",
    )
    lr_schedule: choices.Schedule = Field(
        default="cosine",
        description="How the learning rate falls. Set `constant` to compare numbers of steps.",
    )
    warmup: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Fraction of the steps in which the learning rate rises from zero. Set it if "
        "the first steps do harm.",
    )
    max_grad_norm: float = Field(
        default=0.0,
        ge=0,
        description="Norm that the gradient of all coefficients is clipped to (0 = off). Set it "
        "if single batches disturb the fit.",
    )
    nonlinearity: choices.Nonlinearity = Field(
        default="none",
        description="Map from the learned values to the coefficients: `tanh` keeps them between "
        "-1 and 1, `sigmoid` between 0 and 1, `relu` at 0 or more. Set it with `objective: logits` "
        "if coefficients must stay in such a range.",
    )
    similarity: float = _penalty(
        "the mean cosine between the models' coefficients",
        "Set it to make models use different columns.",
    )
    l1: float = _penalty("the 1-norms of the models' coefficients", "Set it for few nonzero ones.")
    l2: float = _penalty("the 2-norms of the models' coefficients", "Set it for small ones.")
    overlap: float = _penalty(
        "the models' use of the same columns", "Set it to give each column to one model."
    )
    weighted_overlap: float = _penalty(
        "`overlap` with columns weighted by how much the models' task vectors interfere there",
        "It needs a `base_model`.",
    )
    mse: float = _penalty(
        "the squared difference of the logits, in addition to the KL",
        "Set it to match the teachers on unlikely tokens too.",
    )
    entropy: float = _penalty(
        "the entropy of the merged model's predictions", "Set it for more confident predictions."
    )
    start: str = Field(
        default="average",
        description="Start of the fit: `average` (by `weight`), `random`, or an earlier merge (a "
        "path as in `coefficients`), to continue from there.",
    )
