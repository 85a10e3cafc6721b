"""One output tensor in the fit: its settings, its sources, its report and the result."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import Correction
from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.errors import DamError
from mergekit_dam.parameters import TensorParameters


class TensorSettings(TensorParameters, arbitrary_types_allowed=True):
    """How one output tensor is fitted: its parameters, resolved for the sources of the merge.

    Attributes:
        parametrisation: Map from the unknowns to the coefficients of the sources.
        loss_weights: Weight of each source's data, in the order of the sources.
    """

    parametrisation: Parametrisation
    loss_weights: tuple[float, ...]

    def fits(self, kind: str) -> bool:
        """Whether a tensor of a kind ("linear", "norm", "embedding", "head", ...) is fitted."""
        switches = {"embedding": self.embeddings, "norm": self.norms, "head": self.head}
        return switches.get(kind, True)


@dataclass(frozen=True)
class TensorSources:
    """One output tensor's loaded source tensors, and how they are merged.

    Attributes:
        name: Name of the output tensor.
        tensors: One tensor per source, all of one shape and device; borrowed.
        settings: Settings of its fit.
        dtype: Dtype in which it is written.
        teachers: Tensor that each source's own model runs on, if it differs from `tensors`.
    """

    name: str
    tensors: Sequence[Tensor]
    settings: TensorSettings
    dtype: torch.dtype
    teachers: Sequence[Tensor] | None = None

    def on(self, device: torch.device) -> "TensorSources":
        """The same with its tensors on a device; they are copied where they are elsewhere."""
        if self.tensors[0].device == device:
            return self
        tensors = [tensor.to(device) for tensor in self.tensors]
        teachers = self.teachers and [tensor.to(device) for tensor in self.teachers]
        return replace(self, tensors=tensors, teachers=teachers)

    def merged(
        self,
        coefficients: Tensor,
        *,
        axis: int = -1,
        correction: Correction | None = None,
        as_written: bool = True,
    ) -> Tensor:
        """The tensor as it is written: `merge_weights`, then a single cast."""
        merged = merge_weights(
            self.tensors, coefficients, axis=axis, correction=correction, as_written=as_written
        )
        return merged.to(self.dtype)

    def teacher(self, source: int) -> Tensor:
        """The tensor that a source's own model runs on."""
        return (self.teachers or self.tensors)[source]

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
        """Whether all merged tensors are equal, and no coefficients of this form change that."""
        form = self.settings.parametrisation
        if not form.sums_to_one:
            return False
        first, *others = (self.tensors[source] for source in form.reached)
        return all(torch.equal(first, other) for other in others)

    @property
    def alone(self) -> bool:
        """Whether only one source is merged."""
        return len(self.settings.parametrisation.reached) == 1


@dataclass(frozen=True)
class TensorReport:
    """Report of the fit of one tensor.

    Losses are fractions of the energy of the teachers' outputs (for the head: nats per token),
    averaged over the models with their loss weights. They are those of the layer fit: of a tensor
    that was fitted end to end, what it started from.

    Attributes:
        outcome: "fitted", or why the tensor keeps its starting coefficients.
        experts: Reason -> experts of a fused tensor that keep their starting coefficients.
        correction: What became of its correction, if one was asked for.
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
    correction: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedTensor:
    """A merged tensor with the coefficients that made it.

    Attributes:
        merged: The merged tensor, in the dtype in which it is written.
        coefficients: fp32 `[sources, n]` or `[sources, 1]`.
        axis: Dimension of the tensor along which coefficients vary.
        correction: Matrix that `merged` has beside its coefficients, if there is one.
    """

    sources: TensorSources
    merged: Tensor
    coefficients: Tensor
    axis: int
    report: TensorReport
    correction: Correction | None = None


@dataclass(frozen=True)
class TensorSpec:
    """One output tensor before its sources are loaded.

    Attributes:
        name: Name of the output tensor.
        settings: Settings of its fit.
        written: Dtype in which it is written, or None for the sources' dtype.
        tied_to: Tensor whose coefficients it shares, if it is the same parameter.
        renamed: Its name in transformers' model, if a checkpoint has another name for it.
    """

    name: str
    settings: TensorSettings
    written: torch.dtype | None = None
    tied_to: str | None = None
    renamed: str | None = None

    @property
    def in_model(self) -> str:
        """Its name in transformers' model."""
        return self.renamed or self.name

    def sources(
        self, tensors: Sequence[Tensor], teachers: Sequence[Tensor] | None = None
    ) -> TensorSources:
        """The tensor's sources, once they are loaded.

        Args:
            tensors: One tensor per source.
            teachers: Tensor that each source's own model runs on, if it differs from `tensors`.

        Raises:
            DamError: If the sources' shapes differ.
        """
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise DamError(f"{self.name}: required one shape in all models, got {sorted(shapes)}")
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return TensorSources(self.name, tensors, self.settings, self.written or dtype, teachers)
