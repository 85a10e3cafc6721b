"""The entry of `dam` in mergekit's registry, with a specification made from the parameters."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

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
from pydantic import Field, InstanceOf
from pydantic.fields import FieldInfo

from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.in_memory import merge_average, merge_given
from mergekit_dam.errors import DamError
from mergekit_dam.parameters import NAME, ModelParameters, Parameters
from mergekit_dam.request.help import fields, is_number, kinds

LARGEST = 2**63 - 1
"""Largest number that a parameter may be; its square is still finite in fp32."""

PAPER = "https://arxiv.org/abs/2410.08371"


@dataclass(frozen=True)
class Average:
    """Requests the weighted average, in place of coefficients, for tensors in memory."""


_IN_MEMORY: dict[str, Any] = {
    "coefficients": str
    | InstanceOf[CoefficientFile]
    | InstanceOf[Mapping[str, torch.Tensor]]
    | InstanceOf[torch.Tensor]
    | InstanceOf[Average]
    | None
}
"""Types that a caller in this process may pass; a YAML file can hold only text."""


def _parameter_spec(owner: type[Parameters], name: str, field: FieldInfo) -> ParameterSpec:
    value_type: Any = _IN_MEMORY.get(name, field.annotation)
    for constraint in field.metadata:
        value_type = Annotated[value_type, constraint]
    if is_number(field) and not any(hasattr(c, "le") or hasattr(c, "lt") for c in field.metadata):
        value_type = Annotated[value_type, Field(le=LARGEST)]
    if float in kinds(field):
        value_type = Annotated[value_type, Field(allow_inf_nan=False)]
    return ParameterSpec(
        name=name,
        value_type=value_type,
        scope=ParameterScope.INPUT if owner is ModelParameters else ParameterScope.SHARED,
        default=field.default,
        description=field.description,
    )


class DamMerge(GroupMergeMethod):
    """The entry in mergekit's registry, which declares the parameters.

    A merge of models is planned over whole decoder blocks and does not call this class. Single
    tensors come from callers without a plan: mergekit's functions for tensors in memory, and its
    command for raw files. These callers pass the coefficients.
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
        """Check the number of inputs; a slice of one model may leave out the base."""
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
        """Merge tensors in memory with the coefficients in `parameters`.

        Args:
            groups: The tensors, one group per output tensor.
            parameters: `coefficients`, as `in_memory.KnownCoefficients` (or mergekit's
                PerGroupValues of those); or `weight` alone, for the weighted average that a fit
                starts from.
            options: `dtype`, `out_dtype` and `batch_options`, as for every method.

        Raises:
            DamError: If there are no coefficients, or also parameters of a fit.
        """
        asked = {name: value for name, value in (parameters or {}).items() if value is not None}
        by_weight = "coefficients" not in asked and "weight" in asked
        unread = sorted(asked.keys() - {"weight" if by_weight else "coefficients"})
        if unread:
            raise DamError(
                f"dam: tensors in memory are merged with given coefficients, not fitted; "
                f"{', '.join(unread)} would not be read: pass only `coefficients` (or only "
                f"`weight`)"
            )
        if by_weight:
            asked["coefficients"] = Average()
        return super().__call__(groups, parameters=asked, **options)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor of every input with given coefficients.

        Raises:
            DamError: If none are given; a single tensor has no activations to fit on.
        """
        given = parameters["coefficients"]
        if given is None:
            name = group.metadata.name
            raise DamError(
                f"dam fits whole models on calibration text, and cannot fit the single tensor"
                f"{'' if name is None else f' {name!r}'}. For a fit, run it through mergekit-yaml, "
                f"mergekit-multi, mergekit.merge.run_merge or `mergekit-dam merge`; to merge "
                f"tensors with known coefficients, pass `coefficients`: the path of a "
                f"dam_coefficients.safetensors, or a tensor with one row per input"
            )
        if isinstance(given, Average):
            base = next((i for i, entry in enumerate(group.entries) if entry.is_base), None)
            weights = parameters["weight"].values_for(group.entries)
            return merge_average(group.tensors, weights, base=base)
        ids = [entry.id for entry in group.entries]
        return merge_given(group.tensors, given, ids=ids, name=group.metadata.name)
