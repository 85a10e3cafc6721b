"""What the fit of a merge was asked for, resolved and validated: plain frozen data."""

from dataclasses import dataclass
from typing import Literal

import torch

from mergekit_dam.coefficients import Parametrisation
from mergekit_dam.fitting.storage import Offload
from mergekit_dam.objective.settings import LogitsSettings

Objective = Literal["layer", "logits", "layer+logits"]
MetricName = Literal["identity", "sensitivity"]
Fed = Literal["routed", "all"]
Resident = Literal["auto", "always", "never"]
ForwardDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TensorSettings:
    """How one output tensor is fitted.

    Attributes:
        parametrisation: from unknowns to the coefficients of the sources.
        loss_weights: of each source's data, in the order of the sources.
        ridge: pull towards the start, relative to the mean curvature.
        granularity: "column" or "tensor".
        embeddings, norms, head: whether tensors of that kind are fitted.
        experts: the calibration tokens that feed an expert: those "routed" to it, or "all".
    """

    parametrisation: Parametrisation
    loss_weights: tuple[float, ...]
    ridge: float
    granularity: str
    embeddings: bool
    norms: bool
    head: bool
    experts: Fed = "routed"

    def fits(self, kind: str) -> bool:
        """Whether a tensor of a kind ("linear", "norm", "embedding", "head", ...) is fitted."""
        switches = {"embedding": self.embeddings, "norm": self.norms, "head": self.head}
        return switches.get(kind, True)


@dataclass(frozen=True)
class RunSettings:
    """What holds for the fit of every tensor.

    Attributes:
        holdout: fraction of the sequences kept out of the fit.
        objective: "layer", "logits" or "layer+logits".
        metric: of the layer fits: "identity", or "sensitivity" after it.
        logits: the objective `logits`, and the temperature of the fit of the head.
        start: "average", "random" or a path.
        resident: whether weights stay in memory between sweeps.
        stream_offload: where streams are kept.
        gpu_memory: bytes of the GPU's that may be used, or None for all.
        forward_dtype: of products in the blocks.
        seed: of the order of sequences, and of a random start.
    """

    holdout: float
    objective: Objective
    metric: MetricName
    logits: LogitsSettings
    start: str
    resident: Resident
    stream_offload: Offload
    gpu_memory: int | None
    forward_dtype: ForwardDtype
    seed: int

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
