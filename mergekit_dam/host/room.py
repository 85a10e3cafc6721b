"""Whether the disk has room for a merge, which is told before anything is fitted."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mergekit_dam.coefficients.tensors import TensorSpec
from mergekit_dam.errors import DamError

_GB = 1e9


def written_bytes(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    default: torch.dtype | str | None,
) -> int:
    """Bytes of the merged model's tensors, as far as headers give their shapes.

    Args:
        specs: how each tensor is written.
        shapes: output tensor's name -> shape.
        default: the dtype of tensors that are written in that of their sources, as far as a
            configuration names it.
    """
    least = default.itemsize if isinstance(default, torch.dtype) else torch.bfloat16.itemsize
    return sum(
        math.prod(shapes[spec.name]) * (spec.written.itemsize if spec.written else least)
        for spec in specs
        if spec.name in shapes
    )


def check_room(folder: Path, *, model: int, temporary: int, kept: int = 0) -> None:
    """Refuse a merge that does not fit the disk.

    Args:
        folder: a folder on the disk of the output.
        model: bytes of the merged model. An older one stays until the new one is whole.
        temporary: bytes of hidden states in files.
        kept: bytes of hidden states for a next run, as far as they are not there already.

    Raises:
        DamError: there is too little room; the message says how much there is.
    """
    free = shutil.disk_usage(folder).free
    if model + temporary + kept > free:
        states = f" and {temporary / _GB:.3g} GB for hidden states" if temporary else ""
        if kept:
            states += (
                f" and {kept / _GB:.3g} GB to be continued if it is stopped (`resume: false` does "
                f"without)"
            )
        raise DamError(
            f"the merge needs {model / _GB:.3g} GB for the model{states}, and {free / _GB:.3g} GB "
            f"are free on the disk of the output; make room, or name a folder on another disk. "
            f"`mergekit-dam plan` lists everything that a merge keeps there"
        )
