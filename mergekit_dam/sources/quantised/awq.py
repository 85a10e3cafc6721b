"""Weights of AWQ (4 bits, `gemm`), which compressed-tensors converts to its own packed form.

`x.qweight` holds the codes of the transposed weight; beside it are `x.scales`, and `x.qzeros` where
zero is not in the middle. The configuration has the size of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from mergekit_dam.errors import ArchitectureError, first_line
from mergekit_dam.sources.quantised.imports import required
from mergekit_dam.sources.quantised.packed import Packed
from mergekit_dam.sources.quantised.refusals import reason, refusal
from mergekit_dam.sources.quantised.weight import Read

_CODES, _SCALE, _ZERO = "qweight", "scales", "qzeros"
_PER_WORD = 8
"""Codes of 4 bits in an int32."""


@dataclass(frozen=True)
class Awq:
    """One weight of AWQ.

    Attributes:
        module: name of the module, without `.weight`.
        converter: the library's converter, made for the model's configuration.
    """

    module: str
    converter: Any = field(repr=False)
    form: ClassVar[str] = "AWQ"

    @property
    def stored(self) -> str:
        """Name of the codes."""
        return f"{self.module}.{_CODES}"

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the tensors beside the codes."""
        names = (_SCALE, _ZERO) if self.converter.zero_point else (_SCALE,)
        return tuple(f"{self.module}.{name}" for name in names)

    def shape(self, codes: tuple[int, ...], read: Read) -> tuple[int, ...]:
        """The weight's shape, which that of the codes tells; see `QuantisedWeight`."""
        rows, words = codes if len(codes) == 2 else (0, 0)
        if not rows * words:
            raise self._wrong(f"codes of shape {list(codes)}")
        return words * _PER_WORD, rows

    def weight(self, read: Read) -> Tensor:
        """The weight in the dtype of its scales."""
        own = {name: read(name) for name in (self.stored, *self.beside)}
        inputs, words = own[self.stored].shape
        groups = -(-inputs // self.converter.group_size)
        expected = {_SCALE: (groups, words * _PER_WORD), _ZERO: (groups, words)}
        for name in self.beside:
            got, wanted = tuple(own[name].shape), expected[name.rpartition(".")[2]]
            if got != wanted:
                raise self._wrong(f"{name} of shape {list(got)}, not {list(wanted)}")
        try:
            packed = self.converter.process(own)
        except (ValueError, RuntimeError) as error:
            raise self._wrong(first_line(error)) from error
        schemes = tuple(self.converter.update_config(None).config_groups.values())
        return Packed(self.module, self.converter.zero_point, schemes).weight(packed.__getitem__)

    def _wrong(self, found: str) -> ArchitectureError:
        return ArchitectureError(
            f"{self.stored}: required a weight of {self.form} in groups of "
            f"{self.converter.group_size}, got {found}; copy or download the model again, or merge "
            f"the model that it was quantised from"
        )


def find_awq(stored: set[str], settings: Mapping[str, Any]) -> dict[str, Awq]:
    """The weights of AWQ in a checkpoint, by name, from the names of all its tensors.

    Args:
        stored: names of all tensors.
        settings: `quantization_config` of the model's configuration; empty if it has none.

    Raises:
        ArchitectureError: there are some, and the library is not installed, or does not read this
            kind.
    """
    modules = sorted(n.removesuffix(f".{_CODES}") for n in stored if n.endswith(f".{_CODES}"))
    if not modules or settings.get("quant_method") != "awq":
        return {}
    module = "compressed_tensors.entrypoints.convert.converters.autoawq"
    library = required(module, form=Awq.form)
    try:
        converter = library.AutoAWQConverter(
            bits=settings.get("bits", 4),
            group_size=settings.get("group_size", 128),
            zero_point=settings.get("zero_point", True),
            version=settings.get("version") or settings.get("format") or "gemm",
            ignore=(),
        )
        converter.update_config(None)
    except (ValueError, TypeError, NotImplementedError) as error:
        said = f"`quantization_config` in its config.json: {reason(error)}"
        raise refusal(Awq.form, said) from error
    found = {f"{module}.weight": Awq(module, converter) for module in modules}
    return {name: own for name, own in found.items() if {own.stored, *own.beside} <= stored}
