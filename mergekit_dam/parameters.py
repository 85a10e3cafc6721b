"""Every YAML parameter of the merge method `dam`: its type, default, help and where it is set.

The classes below are the single source: mergekit's specification, the checks of a configuration,
the fit and the tables of the parameters are all made from their fields.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ByteSize, ConfigDict, Field

NAME = "dam"
"""Name of the merge method in mergekit's registry."""

Offload = Literal["auto", "device", "host", "disk"]

Nonlinearity = Literal["none", "tanh", "sigmoid", "relu"]
OptimizerName = Literal["adamw", "mofo"]
Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
"""Transformers' schedules that need no arguments of their own; any of them may warm up."""
Granularity = Literal["column", "tensor"]
Objective = Literal["layer", "logits", "layer+logits"]
MetricName = Literal["identity", "sensitivity"]
ExpertFeed = Literal["routed", "all"]
Resident = Literal["auto", "always", "never"]
ForwardDtype = Literal["auto", "float32", "bfloat16"]


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
    granularity: Granularity = Field(
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
    experts: ExpertFeed = Field(
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
    optimizer: OptimizerName = Field(
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
    lr_schedule: Schedule = Field(
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
    nonlinearity: Nonlinearity = Field(
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

    objective: Objective = Field(
        default="layer+logits",
        description="What is fitted: every layer to its teachers' outputs, one after the other; "
        "the logits of the whole model, by gradient descent (the paper's objective); or the "
        "second from the first's result. `layer` takes least time.",
    )
    metric: MetricName = Field(
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
    resident: Resident = Field(
        default="auto",
        description="Whether weights stay in memory between sweeps: `auto` as long as half of it "
        "is free, `never` where others need the memory. The result is the same.",
    )
    stream_offload: Offload = Field(
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
    forward_dtype: ForwardDtype = Field(
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

    @property
    def random_seed(self) -> int:
        """The seed of everything that is drawn: the order of sequences, labels, a random start."""
        return self.seed or 0

    @property
    def one_sweep(self) -> bool:
        """One sweep of layer fits is all: nothing has to be known before tensors are written."""
        return self.objective == "layer" and self.metric == "identity"

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype of products in the blocks, on a device."""
        half = self.forward_dtype == "bfloat16"
        half |= self.forward_dtype == "auto" and device.type == "cuda"
        return torch.bfloat16 if half else torch.float32

    def held_out(self, sequences: int) -> int:
        """Sequences of a model kept out of the fit: at least one where a fraction is asked for."""
        if self.holdout == 0 or sequences == 1:
            return 0
        return min(max(1, round(self.holdout * sequences)), sequences - 1)
