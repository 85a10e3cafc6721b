"""Packed integers of compressed-tensors (`pack-quantized`), which that library unpacks.

`x.weight_packed` holds codes of 1 to 8 bits in int32. Beside it are `x.weight_scale`, the shape in
`x.weight_shape`, and `x.weight_zero_point` where zero is not in the middle. The configuration has
the schemes (bits, size of a group) by which linears were quantised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from mergekit_dam.errors import ArchitectureError, first_line
from mergekit_dam.sources.quantised.imports import required
from mergekit_dam.sources.quantised.refusals import reason, refusal
from mergekit_dam.sources.quantised.weight import Read

_CODES, _SCALE, _SHAPE, _ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"


@dataclass(frozen=True)
class Packed:
    """One packed weight.

    Attributes:
        module: name of the module, without `.weight`.
        zero_point: whether there are zero points.
        schemes: the library's schemes, of which one is this weight's.
    """

    module: str
    zero_point: bool
    schemes: tuple[Any, ...] = field(repr=False)
    form: ClassVar[str] = "compressed-tensors, packed"

    @property
    def stored(self) -> str:
        """Name of the codes."""
        return f"{self.module}.{_CODES}"

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the tensors beside the codes."""
        names = (_SCALE, _SHAPE, _ZERO) if self.zero_point else (_SCALE, _SHAPE)
        return tuple(f"{self.module}.{name}" for name in names)

    def shape(self, codes: tuple[int, ...], read: Read) -> tuple[int, ...]:
        """The weight's shape, as `weight_shape` says; see `QuantisedWeight`."""
        shape = tuple(map(int, read(f"{self.module}.{_SHAPE}").flatten().tolist()))
        if not self._packing(shape, codes):
            raise self._wrong(f"a shape of {list(shape)} and codes of shape {list(codes)}")
        return shape

    def weight(self, read: Read) -> Tensor:
        """The weight in the dtype of its scales."""
        names = (self.stored, *self.beside)
        own = {name.rpartition(".")[2]: read(name) for name in names}
        codes, scale = own[_CODES], own[_SCALE]
        shape = self.shape(tuple(codes.shape), read)
        fitting = [s for s in self._packing(shape, tuple(codes.shape)) if _scales(s, shape, scale)]
        if not fitting:
            raise self._wrong(f"a shape of {list(shape)} and scales of shape {list(scale.shape)}")
        compressor = _library(".compressors.pack_quantized.base").PackedQuantizationCompressor
        try:
            weight: Tensor = compressor.decompress(own, fitting[0])["weight"]
        except (ValueError, RuntimeError) as error:
            raise self._wrong(first_line(error)) from error
        if tuple(weight.shape) != shape:
            raise self._wrong(f"a shape of {list(shape)} and a weight of {list(weight.shape)}")
        return weight

    def _packing(self, shape: tuple[int, ...], codes: tuple[int, ...]) -> list[Any]:
        """The schemes by which a weight of this shape has codes of that shape."""
        if len(shape) < 2 or shape[:-1] != codes[:-1] or min(shape) < 1:
            return []
        return [
            scheme
            for scheme in self.schemes
            if -(-shape[-1] * scheme.weights.num_bits // 32) == codes[-1]
            and scheme.weights.symmetric != self.zero_point
        ]

    def _wrong(self, found: str) -> ArchitectureError:
        schemes = sorted({_said(scheme) for scheme in self.schemes})
        return ArchitectureError(
            f"{self.stored}: required what a scheme of `quantization_config` describes "
            f"({'; '.join(schemes)}), got {found}; copy or download the model again, or merge the "
            f"model that it was quantised from"
        )


def find_packed(
    stored: set[str], dtypes: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Packed]:
    """The packed weights of a checkpoint, by name, from names and headers alone.

    Args:
        stored: names of all tensors.
        dtypes: their dtypes as safetensors calls them; empty for pickled files.
        settings: `quantization_config` of the model's configuration; empty if it has none.

    Raises:
        ArchitectureError: there are some, and the library is not installed, or knows none of the
            schemes.
    """
    modules = [
        module
        for name in sorted(stored)
        for module, _, end in [name.rpartition(".")]
        if end == _CODES
        and dtypes.get(name, "I32") == "I32"
        and {f"{module}.{_SCALE}", f"{module}.{_SHAPE}"} <= stored
        # The library reads no reordered columns.
        and not {f"{module}.weight_g_idx", f"{module}.weight_global_scale"} & stored
    ]
    if not modules:
        return {}
    schemes = _schemes(settings)
    return {f"{m}.weight": Packed(m, f"{m}.{_ZERO}" in stored, schemes) for m in modules}


def _schemes(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """The schemes of integers in a configuration, as the library reads them."""
    library = _library(".quantization")
    try:
        read = library.QuantizationConfig.model_validate(dict(settings))
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        said = f"`quantization_config` in its config.json: {reason(error)}"
        raise refusal(Packed.form, said) from error
    found = tuple(
        scheme
        for scheme in read.config_groups.values()
        if scheme.weights is not None and scheme.weights.type == "int"
    )
    if not found:
        raise refusal(Packed.form, "`quantization_config` in its config.json has no integers")
    return found


def _scales(scheme: Any, shape: tuple[int, ...], scale: Tensor) -> bool:
    """Whether a weight of this shape has scales of that shape by a scheme."""
    grouped = scheme.weights.strategy == "group"
    count = -(-shape[-1] // scheme.weights.group_size) if grouped else 1
    return scale.dim() > 0 and scale.shape[-1] == count


def _said(scheme: Any) -> str:
    own = scheme.weights
    size = f" of {own.group_size}" if own.strategy == "group" else ""
    zero = "" if own.symmetric else ", zero points"
    return f"{own.num_bits} bits, one scale per {own.strategy}{size}{zero}"


def _library(module: str) -> Any:
    return required(f"compressed_tensors{module}", form=Packed.form)
