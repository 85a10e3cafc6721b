"""Weights of 4 bits of bitsandbytes (nf4 and fp4), which that library dequantises.

Beside the codes of `x.weight`, packed into bytes, are `x.weight.absmax` (a number per block),
`x.weight.quant_map` and `x.weight.quant_state.bitsandbytes__nf4`, whose bytes are JSON with the
shape, the dtype and the size of a block. With double quantisation, `absmax` has codes of 8 bits,
and `nested_absmax` and `nested_quant_map` are beside it.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.sources.quantised.imports import required
from mergekit_dam.sources.quantised.refusals import reason
from mergekit_dam.sources.quantised.weight import Read
from mergekit_dam.untrusted import parsed_json

_STATE = ".quant_state.bitsandbytes__"
_SCALES = ("absmax", "quant_map")
_NESTED = ("nested_absmax", "nested_quant_map")

Block = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


class _State(BaseModel):
    """What the library reads from the bytes; it takes them as they are, so they are checked."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_type: Literal["nf4", "fp4"]
    blocksize: Block
    dtype: Literal["bfloat16", "float16", "float32"]
    shape: tuple[PositiveInt, ...]
    nested_blocksize: Block | None = None
    nested_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    nested_offset: float | None = None


@dataclass(frozen=True)
class FourBit:
    """One weight of 4 bits.

    Attributes:
        stored: name of the codes.
        kind: nf4 or fp4.
        nested: whether the scales are quantised, too.
    """

    stored: str
    kind: str
    nested: bool
    form: ClassVar[str] = "bitsandbytes, 4 bit"

    @property
    def _state(self) -> str:
        return f"{self.stored}{_STATE}{self.kind}"

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the tensors beside the codes."""
        scales = (*_SCALES, *_NESTED) if self.nested else _SCALES
        return (*(f"{self.stored}.{scale}" for scale in scales), self._state)

    def shape(self, codes: tuple[int, ...], read: Read) -> tuple[int, ...]:
        """The weight's shape, as its state says; see `QuantisedWeight`."""
        return self._parsed(read(self._state)).shape

    def weight(self, read: Read) -> Tensor:
        """The weight in the dtype of its state, on the device of the codes.

        It is dequantised on the CPU: on a GPU the library needs one that it was compiled for.
        """
        codes = read(self.stored)
        beside = {name.removeprefix(f"{self.stored}."): read(name).cpu() for name in self.beside}
        state = self._parsed(read(self._state))
        self._check_sizes(codes, beside, state)
        library = _library()
        known = library.QuantState.from_dict(beside, device=torch.device("cpu"))
        # It returns the transpose where the codes are one row.
        weight: Tensor = library.dequantize_4bit(codes.cpu().reshape(-1, 1), known)
        return weight.reshape(state.shape).to(codes.device)

    def _parsed(self, state: Tensor) -> _State:
        try:
            return _State.model_validate(parsed_json(bytes(state.flatten().tolist())))
        except (ValueError, TypeError) as error:
            found = f"{self._state} does not say how it was quantised ({reason(error)})"
            raise self._wrong(found) from error

    def _check_sizes(self, codes: Tensor, beside: dict[str, Tensor], state: _State) -> None:
        """The library's kernels read as far as the state says, also beyond the end of a tensor."""
        count = math.prod(state.shape)
        blocks = -(-count // state.blocksize)
        sizes: dict[str, tuple[int, int]] = {
            "bytes of codes": (codes.numel() * codes.itemsize, -(-count // 2)),
            "scales": (beside["absmax"].numel(), blocks),
        }
        if self.nested:
            if None in (state.nested_blocksize, state.nested_dtype, state.nested_offset):
                raise self._wrong(f"{self._state} does not say how its scales were quantised")
            assert state.nested_blocksize is not None
            outer = -(-blocks // state.nested_blocksize)
            sizes["scales of scales"] = (beside["nested_absmax"].numel(), outer)
            sizes["values of a scale"] = (beside["nested_quant_map"].numel(), 256)
        for what, (got, wanted) in sizes.items():
            if got != wanted:
                raise self._wrong(f"a shape of {list(state.shape)} has {wanted} {what}, not {got}")
        dtypes = {"absmax": torch.uint8, **dict.fromkeys(_NESTED, torch.float32)}
        for name, dtype in dtypes.items() if self.nested else ():
            if beside[name].dtype != dtype:
                raise self._wrong(f"`{name}` is {beside[name].dtype}, not {dtype}")

    def _wrong(self, found: str) -> ArchitectureError:
        return ArchitectureError(
            f"{self.stored}: required a weight of {self.form}, got one that is damaged: {found}; "
            f"copy or download the model again"
        )


def find_four_bit(stored: set[str]) -> dict[str, FourBit]:
    """The weights of 4 bits in a checkpoint, by name, from the names of all its tensors.

    Raises:
        ArchitectureError: there are some, and bitsandbytes is not installed.
    """
    found = {}
    for name in sorted(stored):
        weight, state, kind = name.rpartition(_STATE)
        if not state:
            continue
        own = FourBit(weight, kind, nested=f"{weight}.{_NESTED[0]}" in stored)
        if {weight, *own.beside} <= stored:
            found[weight] = own
    if found:
        _library()
    return found


def _library() -> Any:
    return required("bitsandbytes.functional", form=FourBit.form)
