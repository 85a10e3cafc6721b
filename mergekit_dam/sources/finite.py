"""Loaded tensors and merged ones are finite: NaN or infinity in one model would spoil the merge."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.errors import CheckpointError, DamError
from mergekit_dam.vocabulary.merged import OwnRows

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_finite(loaded: Mapping[str, Mapping[Any, Tensor]]) -> None:
    """Check the tensors of a stage once they are loaded.

    Every tensor is read once, for its sum, and the device is waited for once.

    Args:
        loaded: Output tensor's name -> source -> tensor.

    Raises:
        CheckpointError: The first tensor that is not finite, with its model.
    """
    found = [(name, model, own) for name, by in loaded.items() for model, own in by.items()]
    found = [entry for entry in found if entry[2].dtype in _FLOATS]
    suspects = _with_infinite_sums([tensor for _, _, tensor in found])
    for name, model, tensor in (found[index] for index in suspects):
        source = model.model if isinstance(model, OwnRows) else model
        problem = _problem(tensor)
        if problem:
            raise CheckpointError(f"{source}: {name} {problem}; {_remedy(tensor)}")


def require_finite_merge(name: str, merged: Tensor, sources: Mapping[Any, Tensor]) -> None:
    """Check a merged tensor before it is written.

    Args:
        name: Name of the output tensor.
        merged: The tensor in the dtype in which it is written.
        sources: Source -> tensor; empty where they were checked already.

    Raises:
        CheckpointError: A source is not finite.
        DamError: The sources are finite, but the merged tensor is not.
    """
    if merged.dtype not in _FLOATS or not _with_infinite_sums([merged]):
        return
    problem = _problem(merged)
    if problem:
        require_finite({name: sources})
        raise DamError(
            f"{name}: the merged tensor {problem}; its values do not fit in {_said(merged)}: set "
            f"`out_dtype: float32` or `out_dtype: bfloat16`"
        )


def _with_infinite_sums(tensors: Sequence[Tensor]) -> list[int]:
    """Indices of all tensors that hold NaN or infinity, and of the few whose sum overflows."""
    if not tensors:
        return []
    sums = torch.stack([tensor.sum().float() for tensor in tensors])
    wrong: list[int] = (~sums.isfinite()).nonzero().flatten().tolist()
    return wrong


def _problem(tensor: Tensor) -> str | None:
    """What is not finite in a tensor, if anything is."""
    wrong = (~tensor.isfinite()).nonzero()
    if not len(wrong):
        return None
    first = ", ".join(map(str, wrong[0].tolist()))
    value = tensor[tuple(wrong[0])].item()
    return f"has {len(wrong):,} values that are not finite, the first ({value}) at [{first}]"


def _remedy(tensor: Tensor) -> str:
    if tensor.dtype == torch.float16:
        return (
            "take a checkpoint without, or, if the file is fine and `dtype: float16` is too "
            "narrow for it, set `dtype: bfloat16`"
        )
    return "take another checkpoint of this model: no method can merge such values"


def _said(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
