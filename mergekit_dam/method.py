"""Every YAML parameter of the merge method `dam`: its type, default, help and where it is set.

The three classes below are the single source: mergekit's specification, the checks of a
configuration and the table in the README are all made from their fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from mergekit_dam.errors import DamError

NAME = "dam"
PAPER = "https://arxiv.org/abs/2410.08371"


class Parameters(BaseModel):
    """Base of the parameter classes: frozen, and nothing unknown passes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelParameters(Parameters):
    """Parameters of one model; set at top level they hold for every model."""

    calibration: str | None = Field(
        default=None,
        description="Where this model's text comes from: a `.txt`, `.jsonl`, `.json` or `.parquet` "
        "file, a directory of them, or a Hub dataset id; options follow as `:key=value`.",
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description="Relative weight of the model in the average that the fit starts from, "
        "as in mergekit's `linear`.",
    )
    loss_weight: float = Field(
        default=1.0,
        ge=0,
        description="How much this model's data counts in the fit; 0 merges the model without "
        "asking what it does on its data (it then needs no calibration).",
    )


class TensorParameters(Parameters):
    """Parameters of the fit of one tensor; filters and gradients over layers apply."""

    ridge: float = Field(
        default=1e-2,
        gt=0,
        description="Pull of the coefficients towards their start, relative to the mean "
        "curvature; more where calibration text is short.",
    )
    sum_to_one: bool = Field(
        default=True,
        description="Coefficients of a column sum to one over the models and the base (the base "
        "takes the remainder); `false` is the paper's free form.",
    )
    granularity: Literal["column", "tensor"] = Field(
        default="column",
        description="One coefficient per model and input column, or one per model and tensor.",
    )
    embeddings: bool = Field(default=True, description="Fit embeddings; `false` averages them.")
    norms: bool = Field(default=True, description="Fit norm weights; `false` averages them.")
    head: bool = Field(
        default=True, description="Fit the output head (where untied); `false` averages it."
    )


class RunParameters(Parameters):
    """Parameters of the whole merge; one value, at top level."""

    samples: int = Field(
        default=32, gt=0, description="Calibration sequences per model, held-out ones included."
    )
    sequence_length: int = Field(default=512, gt=1, description="Tokens per calibration sequence.")
    holdout: float = Field(
        default=0.125,
        ge=0,
        lt=1,
        description="Fraction of the sequences kept out of the fit to judge it; at 0 the fit "
        "is judged on its own data.",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Temperature of the logits in the fit of the head."
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        description="Seed of the choice of calibration text; default: mergekit's `--random-seed`, "
        "or 0.",
    )
    include_base: bool = Field(
        default=False,
        description="The base is a model to merge too, with a calibration and a weight of its own.",
    )
    coefficients: str | None = Field(
        default=None,
        description="Replay a merge from its `dam_coefficients.safetensors` (or the folder that "
        "holds it): no fit, no calibration.",
    )


SCOPES: dict[type[Parameters], str] = {
    ModelParameters: "model",
    TensorParameters: "tensor",
    RunParameters: "merge",
}


SCOPES_IN_WORDS = {
    "model": "per model, or for all",
    "tensor": "for all, or a slice; filters",
    "merge": "once, at top level",
}


@dataclass(frozen=True)
class ParameterHelp:
    """One row of the README's table."""

    name: str
    scope: str
    type: str
    default: str
    description: str


def fields() -> Iterator[tuple[type[Parameters], str, FieldInfo]]:
    """Every parameter as (class it belongs to, name, field), in the order of the table."""
    for owner in SCOPES:
        for name, field in owner.model_fields.items():
            yield owner, name, field


def parameter_help() -> tuple[ParameterHelp, ...]:
    """The rows of the README's table."""
    return tuple(
        ParameterHelp(
            name=name,
            scope=SCOPES[owner],
            type=_type_name(field.annotation),
            default="" if field.default is None else str(field.default).lower(),
            description=field.description or "",
        )
        for owner, name, field in fields()
    )


def parameter_table() -> str:
    """The README's table, in Markdown."""
    lines = ["| parameter | set | type | default | what it does |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row.name}` | {SCOPES_IN_WORDS[row.scope]} | {row.type} | {row.default} "
        f"| {row.description} |"
        for row in parameter_help()
    ]
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    """`str | None` as `str`, a Literal as its values, anything else by its name."""
    arguments = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if arguments and all(isinstance(a, str) for a in arguments):
        return " or ".join(f"`{a}`" for a in arguments)
    return str((arguments[0] if arguments else annotation).__name__)


def _parameter_spec(owner: type[Parameters], name: str, field: FieldInfo) -> ParameterSpec:
    value_type: Any = field.annotation
    for constraint in field.metadata:
        value_type = Annotated[value_type, constraint]
    return ParameterSpec(
        name=name,
        value_type=value_type,
        scope=ParameterScope.INPUT if owner is ModelParameters else ParameterScope.SHARED,
        default=field.default,
        description=field.description,
    )


class DamMerge(GroupMergeMethod):
    """The entry in mergekit's registry.

    It names the parameters. The merge itself is planned over whole decoder blocks, so
    tensors that come here one by one come from a caller that has no plan.
    """

    spec = MergeMethodSpec(
        name=NAME,
        pretty_name="Differentiable Adaptive Merging",
        reference_url=PAPER,
        contract=InputContract(base=BasePolicy.OPTIONAL, min_inputs=1),
        parameters=tuple(_parameter_spec(*row) for row in fields()),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Refuse: a single tensor holds no activations to fit on.

        Raises:
            DamError: always, naming the ways in.
        """
        raise DamError(
            f"dam fits whole models on calibration text and cannot merge the single tensor "
            f"{group.metadata.name!r}. Run it through mergekit-yaml, mergekit-multi, "
            f"mergekit.merge.run_merge or `mergekit-dam merge`."
        )
