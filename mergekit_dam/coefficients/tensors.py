"""One output tensor on its way through the fit: its sources, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.errors import DamError
from mergekit_dam.parameters import TensorParameters


class TensorSettings(TensorParameters, arbitrary_types_allowed=True):
    """How one output tensor is fitted: its parameters, resolved for the sources of the merge.

    Attributes:
        parametrisation: from unknowns to the coefficients of the sources.
        loss_weights: of each source's data, in the order of the sources.
    """

    parametrisation: Parametrisation
    loss_weights: tuple[float, ...]

    def fits(self, kind: str) -> bool:
        """Whether a tensor of a kind ("linear", "norm", "embedding", "head", ...) is fitted."""
        switches = {"embedding": self.embeddings, "norm": self.norms, "head": self.head}
        return switches.get(kind, True)


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


@dataclass(frozen=True)
class TensorSpec:
    """One output tensor as planned.

    Attributes:
        name: of the output tensor.
        settings: how it is fitted.
        written: dtype it is written in, or None for that of the sources.
        tied_to: the tensor whose coefficients it shares, if it is the same parameter.
        renamed: what transformers' model calls it, where a checkpoint has another name for it.
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
        """The plan with the loaded tensors of every source.

        Args:
            teachers: what each source's own model runs on, if that is something else.

        Raises:
            DamError: the sources' shapes differ.
        """
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise DamError(f"{self.name}: required one shape in all models, got {sorted(shapes)}")
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return TensorSources(self.name, tensors, self.settings, self.written or dtype, teachers)
