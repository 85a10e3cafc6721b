"""Every YAML parameter of the merge method `dam`: its type, default, help and where it is set.

The classes below are the single source: mergekit's specification, the checks of a
configuration and the tables in the README are all made from their fields.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
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
from pydantic import BaseModel, ByteSize, ConfigDict, Field, InstanceOf
from pydantic.fields import FieldInfo

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.errors import DamError
from mergekit_dam.given import merge_average, merge_given

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
        "file, a directory of them, or a Hub dataset id; options follow as `:key=value`. Every "
        "model whose data counts needs it.",
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description="Relative weight of the model in the average that the fit starts from and is "
        "pulled to, as in mergekit's `linear`; set it where you know a better average.",
    )
    loss_weight: float = Field(
        default=1.0,
        ge=0,
        description="How much this model's data counts in the fit; more for the skill that "
        "matters most. 0 merges the model without asking what it does on its data (it then needs "
        "no calibration).",
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
        "takes the remainder); `false`, the paper's free form, to repeat its setting.",
    )
    granularity: Literal["column", "tensor"] = Field(
        default="column",
        description="One coefficient per model and input column, or one per model and tensor, "
        "which asks less of short calibration text.",
    )
    embeddings: bool = Field(
        default=True,
        description="Fit embeddings; `false` averages them, where calibration text shows few of "
        "the tokens that matter.",
    )
    norms: bool = Field(
        default=True,
        description="Fit norm weights; `false` averages them, to leave them as `linear` would.",
    )
    head: bool = Field(
        default=True,
        description="Fit the output head (where untied); `false` averages it, which saves time "
        "where the vocabulary is large.",
    )
    experts: Literal["routed", "all"] = Field(
        default="routed",
        description="Calibration tokens that an expert of a mixture is fitted to: those that the "
        "merged router sends to it, or all. `all` leaves no expert out, however short the text; "
        "where there is enough for both, `routed` came nearer to the models.",
    )


class LogitsParameters(Parameters):
    """Parameters of the whole merge that only the end-to-end fit reads: objective `logits`."""

    steps: int | None = Field(
        default=None,
        gt=0,
        description="Steps of the optimiser; default: 20, and 400 more if those lowered the "
        "held-out KL by a tenth, as with models that are far apart. Set it to know the cost "
        "beforehand.",
    )
    batch_size: int = Field(
        default=1,
        gt=0,
        description="Sequences of every model whose gradient is taken at once; fewer take less "
        "memory.",
    )
    gradient_accumulation: int = Field(
        default=1,
        gt=0,
        description="Batches per step; more, where memory holds no larger batch.",
    )
    optimizer: Literal["adamw", "mofo"] = Field(
        default="adamw",
        description="AdamW without decay, or MoFO, which in every step moves only the "
        "coefficients of largest momentum, to stay nearer to the start.",
    )
    mofo_fraction: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Fraction of a model's coefficients in a tensor that a step of `mofo` moves; "
        "less stays nearer to the start.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak of the learning rate; default: 0.1, or 0.01 with `sum_to_one: false`. "
        "Lower it if the losses jump.",
    )
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = Field(
        default="cosine",
        description="How the learning rate falls; `constant` to compare numbers of steps.",
    )
    warmup: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Fraction of the steps in which the learning rate rises from zero; set it if "
        "the first steps do harm.",
    )
    max_grad_norm: float = Field(
        default=0.0,
        ge=0,
        description="Norm that the gradient of all coefficients is cut to (0 = off); set it if "
        "single batches throw the fit off.",
    )
    nonlinearity: Literal["none", "tanh", "sigmoid", "relu"] = Field(
        default="none",
        description="Map from what is learned to the coefficients: `tanh` keeps them between -1 "
        "and 1, `sigmoid` between 0 and 1, `relu` at 0 or more. For `objective: logits`, where "
        "coefficients must not leave a range.",
    )
    similarity: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the mean cosine between models' coefficients (0 = off); set it to "
        "have models share out the columns.",
    )
    l1: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the 1-norms of models' coefficients (0 = off); set it for few that "
        "are not zero.",
    )
    l2: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the 2-norms of models' coefficients (0 = off); set it for small "
        "ones.",
    )
    overlap: float = Field(
        default=0.0,
        ge=0,
        description="Weight of how much models use the same columns (0 = off); set it to give "
        "each column to one model.",
    )
    weighted_overlap: float = Field(
        default=0.0,
        ge=0,
        description="The same, with columns weighted by how far the models' task vectors "
        "interfere there (0 = off); needs a `base_model`.",
    )
    mse: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the squared difference of logits beside the KL (0 = off); set it "
        "to hold unlikely tokens to the teachers too.",
    )
    entropy: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the entropy of the merged model's predictions (0 = off); set it "
        "for a model that commits itself more.",
    )
    start: str = Field(
        default="average",
        description="What the fit starts from: `average` (by `weight`), `random`, or an earlier "
        "merge (a path as in `coefficients`), to go on from there.",
    )


class RunParameters(LogitsParameters):
    """Parameters of the whole merge; one value, at top level."""

    objective: Literal["layer", "logits", "layer+logits"] = Field(
        default="layer+logits",
        description="What is fitted: every layer to its teachers' outputs, one after the other; "
        "the logits of the whole model, by gradient descent (the paper's objective); or the "
        "second from the first's result. `layer` takes least time.",
    )
    metric: Literal["identity", "sensitivity"] = Field(
        default="sensitivity",
        description="How layer fits measure an error: plainly, or (in a second sweep) by how much "
        "the loss feels it; `identity` takes less time.",
    )
    samples: int = Field(
        default=32,
        gt=0,
        description="Calibration sequences per model, held-out ones included; more overfit less, "
        "and take time in proportion.",
    )
    sequence_length: int = Field(
        default=512,
        gt=1,
        description="Tokens per calibration sequence; as many as what the models are good at "
        "needs.",
    )
    holdout: float = Field(
        default=0.125,
        ge=0,
        lt=1,
        description="Fraction of the sequences kept out of the fit to judge it; more where there "
        "are few. At 0 the fit is judged on its own data.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Temperature of the logits that are compared, in the fit of the head as in "
        "the objective `logits`; above 1, tokens that are unlikely count more.",
    )
    resident: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether weights stay in memory between sweeps: `auto` as long as half of it "
        "is free, `never` where others need the memory. The result is the same.",
    )
    stream_offload: Literal["auto", "device", "host", "disk"] = Field(
        default="auto",
        description="Where the hidden states of the calibration text are kept between blocks: "
        "`auto` fills up to a quarter of the device's memory, then of the host's, then takes files "
        "beside the output. The result is the same.",
    )
    gpu_memory: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Memory of the GPU that the merge may use, such as `12GB`; less where others "
        "use it too. Default: all of it.",
    )
    forward_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of the products in models' blocks: `auto` is bfloat16 on a GPU, "
        "which is faster there, and float32 on a CPU. Hidden states, sums and solves are float32 "
        "or better.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        description="Seed of the choice of calibration text and of its order; change it to see "
        "how much they matter. Default: mergekit's `--random-seed`, or 0.",
    )
    include_base: bool = Field(
        default=False,
        description="The base is a model to merge too, with a calibration and a weight of its "
        "own; where its own skills must not suffer.",
    )
    other_weights: Literal["average", "error"] = Field(
        default="average",
        description="What becomes of weights outside of the decoder, such as a vision tower, which "
        "text tells nothing of: they are averaged by `weight`, and named in the report; or the "
        "merge is refused.",
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


HEADINGS = {
    "model": "Of a model; at top level, of all models",
    "tensor": "Of the fit of a tensor; at top level or for a slice, with filters and gradients",
    "merge": "Of the whole merge; once, at top level",
    "logits": "Of the objective `logits` (and `layer+logits`); once, at top level",
}
"""What the tables in the README hold, by scope; the parameters of the merge are in two tables."""


@dataclass(frozen=True)
class ParameterHelp:
    """One row of the README's tables; `table` is a key of `HEADINGS`."""

    name: str
    table: str
    type: str
    default: str
    description: str


def fields() -> Iterator[tuple[type[Parameters], str, FieldInfo]]:
    """Every parameter as (class it belongs to, name, field)."""
    for owner in SCOPES:
        for name, field in owner.model_fields.items():
            yield owner, name, field


def parameter_help() -> tuple[ParameterHelp, ...]:
    """The rows of the README's tables."""
    return tuple(
        ParameterHelp(
            name=name,
            table="logits" if name in LogitsParameters.model_fields else SCOPES[owner],
            type=_type_name(field.annotation),
            default="" if field.default is None else str(field.default).lower(),
            description=field.description or "",
        )
        for owner, name, field in fields()
    )


def parameter_tables() -> str:
    """The README's tables, in Markdown."""
    parts = []
    for table, heading in HEADINGS.items():
        lines = [
            f"**{heading}**",
            "",
            "| parameter | type | default | what it does, and when to touch it |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| `{row.name}` | {row.type} | {row.default} | {row.description} |"
            for row in parameter_help()
            if row.table == table
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _type_name(annotation: Any) -> str:
    """`str | None` as `str`, a Literal as its values, bytes as a size, else by its name."""
    if ByteSize in getattr(annotation, "__args__", ()):
        return "size"
    arguments = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if arguments and all(isinstance(a, str) for a in arguments):
        return " or ".join(f"`{a}`" for a in arguments)
    return str((arguments[0] if arguments else annotation).__name__)


@dataclass(frozen=True)
class Average:
    """Stands for the coefficients of the weighted average, where tensors in memory are merged."""


_IN_MEMORY: dict[str, Any] = {
    "coefficients": str
    | InstanceOf[CoefficientFile]
    | InstanceOf[Mapping[str, torch.Tensor]]
    | InstanceOf[torch.Tensor]
    | InstanceOf[Average]
    | None
}
"""What a caller in this process may hand over, where a YAML has text alone."""


def _parameter_spec(owner: type[Parameters], name: str, field: FieldInfo) -> ParameterSpec:
    value_type: Any = _IN_MEMORY.get(name, field.annotation)
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

    It names the parameters. The merge itself is planned over whole decoder blocks, so tensors
    that come here one by one come from a caller that has no plan: mergekit's functions for
    tensors in memory, and its command for raw files. Those bring the coefficients.
    """

    spec = MergeMethodSpec(
        name=NAME,
        pretty_name="Differentiable Adaptive Merging",
        reference_url=PAPER,
        contract=InputContract(base=BasePolicy.OPTIONAL, min_inputs=1),
        parameters=tuple(_parameter_spec(*row) for row in fields()),
    )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check how many inputs there are; a slice of one model may leave out the base."""
        base = base_id if base_id in input_ids else None
        super().validate_inputs(input_ids, base, group_name=group_name)

    def __call__(
        self,
        groups: Sequence[TensorGroup],
        /,
        *,
        parameters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Merge tensors in memory with the coefficients that `parameters` brings.

        Args:
            parameters: `coefficients`, as `given.Given` (or mergekit's PerGroupValues of those);
                or `weight` alone, for the weighted average that a fit starts from.
            options: `dtype`, `out_dtype` and `batch_options`, as of every method.

        Raises:
            DamError: there are none, or parameters of a fit beside them.
        """
        asked = {name: value for name, value in (parameters or {}).items() if value is not None}
        by_weight = "coefficients" not in asked and "weight" in asked
        unread = sorted(asked.keys() - {"weight" if by_weight else "coefficients"})
        if unread:
            raise DamError(
                f"dam: tensors in memory are merged with given coefficients, not fitted; "
                f"{', '.join(unread)} would not be read: leave out what is not `coefficients` (or "
                f"`weight`)"
            )
        if by_weight:
            asked["coefficients"] = Average()
        return super().__call__(groups, parameters=asked, **options)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor of every input with given coefficients.

        Raises:
            DamError: none are given: a single tensor holds no activations to fit on.
        """
        given = parameters["coefficients"]
        if given is None:
            raise DamError(
                f"dam fits whole models on calibration text, and cannot fit the single tensor "
                f"{group.metadata.name!r}. For a fit, run it through mergekit-yaml, "
                f"mergekit-multi, mergekit.merge.run_merge or `mergekit-dam merge`; to merge "
                f"tensors with known coefficients, pass `coefficients`: the path of a "
                f"dam_coefficients.safetensors, or a tensor with a row for each input"
            )
        if isinstance(given, Average):
            base = next((i for i, entry in enumerate(group.entries) if entry.is_base), None)
            weights = parameters["weight"].values_for(group.entries)
            return merge_average(group.tensors, weights, base=base)
        ids = [entry.id for entry in group.entries]
        return merge_given(group.tensors, given, ids=ids, name=group.metadata.name)
