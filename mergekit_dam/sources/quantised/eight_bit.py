"""Codes of 8 bits with scales beside them, where `W = (codes - zero point) * scale` says it all.

The formats, with their names of the scale of `x.weight`:

    fp8 of DeepSeek, Qwen and transformers   x.weight_scale_inv, one number per block (128 x 128)
    compressed-tensors, fbgemm, ModelOpt     x.weight_scale, one per tensor, row, group or block
    bitsandbytes, 8 bit                      x.SCB, one per row; W = codes * SCB / 127
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.sources.quantised.weight import Read

_CODES = ("F8_E4M3", "F8_E5M2", "I8")


@dataclass(frozen=True)
class Codes:
    """One quantised weight.

    Attributes:
        stored: name of the codes, which is that of the weight.
        scale, zero_point: names of the tensors beside the codes.
        block: rows and columns of a block with one scale; None if the shapes alone tell.
        unit: what the scale is divided by.
    """

    stored: str
    scale: str
    zero_point: str | None = None
    block: tuple[int, ...] | None = None
    unit: float = 1.0
    form: ClassVar[str] = "8 bit"

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the tensors beside the codes."""
        return (self.scale,) if self.zero_point is None else (self.scale, self.zero_point)

    def shape(self, codes: tuple[int, ...], read: Read) -> tuple[int, ...]:
        """The weight's shape: that of the codes."""
        return codes

    def weight(self, read: Read) -> Tensor:
        """The weight that the codes stand for, in fp32 and in their shape.

        Raises:
            ArchitectureError: the scales' shape does not fit the codes'.
        """
        codes = read(self.stored)
        values = codes.to(torch.float32)
        if self.zero_point is not None:
            values -= spread(read(self.zero_point).to(torch.float32), codes.shape, self.block)
        scale = read(self.scale)
        # Of the microscaling formats (OCP MX): a byte is the exponent of a power of two.
        exponent = scale.dtype == torch.uint8
        scale = (scale.float() - 127).exp2() if exponent else scale.float()
        values *= spread(scale / self.unit, codes.shape, self.block)
        return values


def find_codes(
    stored: set[str], dtypes: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Codes]:
    """The codes of 8 bits that have scales beside them, by name, from names and headers alone.

    Args:
        stored: names of all tensors.
        dtypes: their dtypes as safetensors calls them; empty for pickled files.
        settings: `quantization_config` of the model's configuration; empty if it has none.
    """
    found = {}
    for name in sorted(stored):
        if dtypes.get(name, "I8" if name.endswith(".weight") else "") in _CODES:
            own = _codes_of(name, stored, settings)
            if own is not None:
                found[name] = own
    return found


def _codes_of(name: str, stored: set[str], settings: Mapping[str, Any]) -> Codes | None:
    block = settings.get("weight_block_size")
    if f"{name}_scale_inv" in stored:
        return Codes(name, f"{name}_scale_inv", block=tuple(block or (128, 128)))
    if f"{name}_scale" in stored:
        zero = f"{name}_zero_point"
        given = None if block is None else tuple(block)
        return Codes(name, f"{name}_scale", zero if zero in stored else None, given)
    rows = f"{name.removesuffix('weight')}SCB"
    return Codes(name, rows, unit=127.0) if name.endswith(".weight") and rows in stored else None


def spread(scale: Tensor, shape: torch.Size, block: tuple[int, ...] | None) -> Tensor:
    """Scales of blocks in a shape that broadcasts to the shape of the codes.

    Args:
        scale: one number, one per row, or one per block.
        shape: shape of the codes.
        block: rows and columns of a block; the last ones of a dimension may be fewer.

    Raises:
        ArchitectureError: the scale's shape does not fit.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1 and len(scale) == shape[0]:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    sizes = [*[1] * (len(shape) - len(block or ())), *(block or ())]
    wrong = f"scales of shape {list(scale.shape)} do not fit codes of shape {list(shape)}"
    if scale.dim() != len(shape):
        raise ArchitectureError(wrong)
    for axis, (size, count) in enumerate(zip(shape, scale.shape, strict=True)):
        if count in (1, size):
            continue
        step = sizes[axis]
        if -(-size // step) != count:
            step = max(1, size // count)
        if -(-size // step) != count:
            raise ArchitectureError(wrong)
        scale = scale.repeat_interleave(step, axis).narrow(axis, 0, size)
    return scale
