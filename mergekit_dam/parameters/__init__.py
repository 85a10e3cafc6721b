"""Every YAML parameter of the merge method `dam`: its type, default, help and where it is set.

The classes below are the single source of mergekit's specification, the checks of a configuration,
the settings of the fit and the README's tables.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import ByteSize, Field

from mergekit_dam import choices
from mergekit_dam.parameters.base import Parameters
from mergekit_dam.parameters.logits import LogitsParameters

__all__ = ["LogitsParameters", "ModelParameters", "Parameters", "RunParameters", "TensorParameters"]

if TYPE_CHECKING:
    import torch

NAME = "dam"
"""Name of the merge method in mergekit's registry."""

UNRECORDED = frozenset({"resume", "tracking"})
"""Parameters that say nothing of the result: its provenance leaves them out."""

REPLAYED = UNRECORDED | {"coefficients", "changed_models", "include_base", "other_weights"}
"""Parameters of the whole merge that a replay reads; the others are of a fit."""


class ModelParameters(Parameters):
    """Parameters of one model; at top level, they hold for every model."""

    calibration: str | list[str] | None = Field(
        default=None,
        description="Text for this model: a file, a folder, or the id of a Hub dataset; options "
        "follow as `:key=value`. Or `self`: the model writes it. Or a list of those. Needed if the "
        "model's data counts.",
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description="Relative weight of the model in the average that the fit starts from and is "
        "pulled to, as in mergekit's `linear`. Set it if you know a better average.",
    )
    loss_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of this model's data in the fit. Raise it for the skill that matters "
        "most. At 0 the model is merged regardless of its data and needs no calibration.",
    )


class TensorParameters(Parameters):
    """Parameters of the fit of one tensor; filters and gradients over layers apply."""

    ridge: float = Field(
        default=1e-2,
        gt=0,
        description="Strength of the pull of the coefficients to their start, relative to the "
        "mean curvature. Raise it if there is little calibration text.",
    )
    sum_to_one: bool = Field(
        default=True,
        description="Coefficients of a column sum to one over the models and the base, which "
        "takes the remainder. `false` is the paper's free form; set it to reproduce the paper.",
    )
    granularity: choices.Granularity = Field(
        default="column",
        description="One coefficient per model and input column, or one per model and tensor. The "
        "latter needs less calibration text.",
    )
    correction: choices.CorrectionKind = Field(
        default="low_rank",
        description="Matrix that is added to a fitted linear: two factors of `correction_rank`, "
        "or `full`, as large as the weight. With `none`, coefficients alone are learned.",
    )
    correction_rank: int = Field(
        default=64, gt=0, description="Rank of the factors. Lower it to save disk."
    )
    embeddings: bool = Field(
        default=True,
        description="Fit the embeddings. `false` averages them; set it if the calibration text "
        "has few of the tokens that matter.",
    )
    norms: bool = Field(
        default=True, description="Fit the norm weights. `false` averages them, as `linear` would."
    )
    head: bool = Field(
        default=True,
        description="Fit the output head, if untied. `false` averages it, which saves time if the "
        "vocabulary is large.",
    )
    experts: choices.ExpertFeed = Field(
        default="routed",
        description="Calibration tokens that an expert of a mixture is fitted to: those that the "
        "merged router sends to it, or all. `all` fits every expert, however short the text is; "
        "with enough text for both, `routed` came closer to the models.",
    )


class RunParameters(LogitsParameters):
    """Parameters of the whole merge; one value, at top level."""

    objective: choices.Objective = Field(
        default="layer+logits",
        description="What is fitted: one layer after the other, to its teachers' outputs "
        "(`layer`); the logits of the whole model, by gradient descent (`logits`, the paper's "
        "objective); or both in this order. `layer` takes the least time.",
    )
    metric: Literal["identity", "sensitivity"] = Field(
        default="sensitivity",
        description="How layer fits measure an error: directly (`identity`), or by its effect on "
        "the loss, in a second sweep (`sensitivity`). `identity` takes less time.",
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Time that the merge may take. Beyond a first sweep of layer fits, what cannot "
        "be finished in it is cut short or left out: the result depends on the machine's speed.",
    )
    samples: int = Field(
        default=32,
        gt=0,
        description="Calibration sequences per model, including held-out ones. More of them "
        "overfit less; the time grows in proportion.",
    )
    sequence_length: int = Field(
        default=512,
        gt=1,
        description="Tokens per calibration sequence. Set as many as the models' skills need.",
    )
    holdout: float = Field(
        default=0.125,
        ge=0,
        lt=1,
        description="Fraction of the sequences that is kept out of the fit to judge it. Raise it "
        "if there are few sequences. At 0 the fit is judged on its own data.",
    )
    temperature: float = Field(
        default=1.0,
        ge=1e-3,
        description="Temperature of the logits that are compared, in the fit of the head and in "
        "the objective `logits`. Above 1, unlikely tokens count more.",
    )
    resident: choices.Resident = Field(
        default="auto",
        description="Whether weights stay in memory between sweeps: with `auto` while half of it "
        "is free, and enough to fit a block. Set `never` if others need it. Results are the same.",
    )
    stream_offload: choices.Offload = Field(
        default="auto",
        description="Where the hidden states of the calibration text are kept between blocks: "
        "`auto` fills up to a quarter of the device's memory, then of the host's, then uses files "
        "beside the output. The result is the same.",
    )
    gpu_memory: ByteSize | None = Field(
        default=None,
        gt=0,
        description="GPU memory that the merge may use, such as `12GB`. Default: all of it. Set "
        "it if other programs use the GPU too.",
    )
    forward_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of products in the blocks: `auto` is bfloat16 on a GPU (and TF32 "
        "of sums over tokens), where it is faster, and float32 on a CPU. Solves are more precise.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        description="Seed of the choice and order of calibration text. Change it to see how much "
        "they matter. Default: mergekit's `--random-seed`, or 0.",
    )
    include_base: bool = Field(
        default=False,
        description="Merge the base like the other models, with a calibration and a weight of its "
        "own. Set it if the base has skills that must not suffer.",
    )
    other_weights: Literal["average", "error"] = Field(
        default="average",
        description="Weights outside the decoder, such as a vision tower, cannot be fitted on "
        "text: `average` averages them by `weight` (the report names them); `error` refuses the "
        "merge.",
    )
    coefficients: str | None = Field(
        default=None,
        description="Replay a merge from its `dam_coefficients.safetensors` (or the folder that "
        "holds it), without a fit and without calibration.",
    )
    changed_models: Literal["error", "allow"] = Field(
        default="error",
        description="Models of a replay whose weights are not those of the merge: `error` refuses "
        "them by name; `allow` merges them with the coefficients of the model of their name, or of "
        "their place in the list.",
    )

    resume: bool = Field(
        default=True,
        description="Continue a merge to the same place that was stopped, and keep beside the "
        "output what is done, for the next run. `false` starts afresh and keeps nothing.",
    )
    tracking: choices.Tracking = Field(
        default="none",
        description="What follows the losses, KL, speed and memory of the merge while it runs: "
        "`tensorboard`, in the folder `dam_tracking` of the output, or `wandb`; either needs the "
        "extra of its name. The merged model is the same.",
    )

    @property
    def random_seed(self) -> int:
        """Seed of all random draws: the order of sequences, labels, a random start."""
        return self.seed or 0

    @property
    def one_sweep(self) -> bool:
        """Whether one sweep of layer fits is the whole fit, so that tensors are written at once."""
        return self.objective == "layer" and self.metric == "identity"

    def dtype_on(self, device: "torch.device") -> "torch.dtype":
        """Dtype of the products in the models' blocks on a device."""
        import torch  # takes seconds; commands tell of a typo before

        half = self.forward_dtype == "auto" and device.type == "cuda"
        return torch.bfloat16 if half or self.forward_dtype == "bfloat16" else torch.float32

    def held_out(self, sequences: int) -> int:
        """Number of a model's held-out sequences: at least 1 if `holdout` is not 0, never all."""
        return min(max(int(self.holdout > 0), round(self.holdout * sequences)), sequences - 1)
