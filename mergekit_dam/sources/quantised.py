"""Quantised weights in checkpoints: which tensors are codes, and the weights they stand for.

Read as weights: codes of 8 bits with scales beside them, where the whole definition is
`W = (codes - zero point) * scale`. The formats, with their names of the scale of `x.weight`:

    fp8 of DeepSeek, Qwen and transformers   x.weight_scale_inv, one number per block (128 x 128)
    compressed-tensors, fbgemm, ModelOpt     x.weight_scale, one per tensor, row, group or block
    bitsandbytes, 8 bit                      x.SCB, one per row; W = codes * SCB / 127

Everything else (4 bits, packed, sparse, rotated) is refused by name: the tool that wrote it
is the one that can read it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.errors import ArchitectureError, listed

_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes, 4 bit",
    ".weight_packed": "compressed-tensors, packed",
    ".weight_g_idx": "compressed-tensors, with reordered columns",
    ".bitmask": "compressed-tensors, sparse",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    "_blocks": "MXFP4",
    ".W_q": "HQQ",
    "._data": "quanto",
}
"""Ends of the names of tensors that only formats write that are refused."""

_NO_WEIGHTS = (
    "input_scale",
    "output_scale",
    "activation_scale",
    "input_zero_point",
    "weight_shape",
    "weight_format",
    "k_scale",
    "v_scale",
)
"""Last parts of names beside codes that say how activations are rounded, or how codes lie."""

_CODES = ("F8_E4M3", "F8_E5M2", "I8")
_NEVER_WEIGHTS = (*_CODES, "U8", "I16", "I32", "F4", "F8_E8M0")


@dataclass(frozen=True)
class Codes:
    """One quantised weight.

    Attributes:
        scale, zero_point: names of the tensors beside the codes.
        block: rows and columns of a block with one scale; None if the shapes alone tell.
        unit: what the scale is divided by.
    """

    scale: str
    zero_point: str | None = None
    block: tuple[int, ...] | None = None
    unit: float = 1.0

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the tensors beside the codes."""
        return (self.scale,) if self.zero_point is None else (self.scale, self.zero_point)

    def weight(self, codes: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The weight that the codes stand for, in fp32 and in their shape.

        Args:
            read: reads a tensor of the checkpoint by its name.

        Raises:
            ArchitectureError: the scales' shape does not fit the codes'.
        """
        values = codes.to(torch.float32)
        if self.zero_point is not None:
            values -= spread(read(self.zero_point).to(torch.float32), codes.shape, self.block)
        scale = read(self.scale)
        # Of the microscaling formats (OCP MX): a byte is the exponent of a power of two.
        exponent = scale.dtype == torch.uint8
        scale = (scale.float() - 127).exp2() if exponent else scale.float()
        values *= spread(scale / self.unit, codes.shape, self.block)
        return values


@dataclass(frozen=True)
class Quantisation:
    """The quantised weights of a checkpoint; empty if all weights are plain.

    Attributes:
        codes: name of a weight -> how its codes are read.
        hidden: names of tensors that are no weights.
        name: the format, as its tool calls it.
    """

    codes: Mapping[str, Codes] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    name: str = ""


def find_quantised(
    names: Iterable[str], dtypes: Mapping[str, str], settings: Mapping[str, Any] | None
) -> Quantisation:
    """Find the quantised weights of a checkpoint, from names and headers alone.

    Args:
        names: names of all tensors.
        dtypes: their dtypes as safetensors calls them; empty for pickled files.
        settings: `quantization_config` of the model's configuration, if it has one.

    Raises:
        ArchitectureError: the checkpoint has a format that cannot be read as weights.
    """
    stored, settings = set(names), settings or {}
    method = str(settings.get("quant_method", ""))
    _refuse_packed(stored, method)
    found = {}
    for name in sorted(stored):
        if dtypes.get(name, "I8" if name.endswith(".weight") else "") in _CODES:
            own = _codes_of(name, stored, settings)
            if own is not None:
                found[name] = own
    unscaled = [n for n, d in dtypes.items() if _is_code(n, d) and n in stored and n not in found]
    if unscaled:
        raise _refusal(
            method or "in a format of its own",
            f"{listed(sorted(unscaled))} is {dtypes[min(unscaled)]} without scales beside it",
        )
    if not found:
        return Quantisation()
    if settings.get("transform_config"):
        raise _refusal(method, "`transform_config` in its config.json rotates the weights")
    hidden = {name for own in found.values() for name in own.beside}
    hidden |= {name for name in stored if name.rsplit(".", 1)[-1] in _NO_WEIGHTS}
    return Quantisation(found, frozenset(hidden), method or "8 bit")


def _is_code(name: str, dtype: str) -> bool:
    """Whether a tensor can be no weight and no buffer by its dtype; masks are integers, too."""
    return dtype.startswith(("F8", "F4")) or (dtype in _NEVER_WEIGHTS and name.endswith(".weight"))


def _codes_of(name: str, stored: set[str], settings: Mapping[str, Any]) -> Codes | None:
    block = settings.get("weight_block_size")
    if f"{name}_scale_inv" in stored:
        return Codes(f"{name}_scale_inv", block=tuple(block or (128, 128)))
    if f"{name}_scale" in stored:
        zero = f"{name}_zero_point"
        given = None if block is None else tuple(block)
        return Codes(f"{name}_scale", zero if zero in stored else None, given)
    rows = f"{name.removesuffix('weight')}SCB"
    return Codes(rows, unit=127.0) if name.endswith(".weight") and rows in stored else None


def _refuse_packed(stored: set[str], method: str) -> None:
    for end, tool in _PACKED.items():
        packed = sorted(name for name in stored if name.endswith(end))
        if end == "_blocks":
            packed = [n for n in packed if n.removesuffix("blocks") + "scales" in stored]
        if packed:
            own = method and not tool.lower().startswith(method)
            raise _refusal(f"{method}: {tool}" if own else tool, f"packed: {listed(packed)}")


def _refusal(form: str, found: str) -> ArchitectureError:
    remedy = ""
    if "bitsandbytes" in form:
        remedy = (
            ', or write it out as plain weights: python -c "from transformers import '
            "AutoModelForCausalLM as M; m = M.from_pretrained('FOLDER'); m.dequantize(); "
            "m.save_pretrained('PLAIN', save_original_format=False)\""
        )
    return ArchitectureError(
        f"required plain weights, or codes of 8 bits with their scales, got a quantised model "
        f"({form}): {found}. Merge the model that it was quantised from{remedy}"
    )


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
