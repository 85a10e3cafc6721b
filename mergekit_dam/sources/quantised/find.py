"""The quantised weights of a checkpoint, found by the names and headers of its tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_dam.errors import listed
from mergekit_dam.sources.quantised.awq import find_awq
from mergekit_dam.sources.quantised.eight_bit import find_codes
from mergekit_dam.sources.quantised.four_bit import find_four_bit
from mergekit_dam.sources.quantised.packed import find_packed
from mergekit_dam.sources.quantised.refusals import refusal, refuse_packed
from mergekit_dam.sources.quantised.weight import QuantisedWeight

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

_NEVER_WEIGHTS = ("I8", "U8", "I16", "I32")


@dataclass(frozen=True)
class Quantisation:
    """The quantised weights of a checkpoint; empty if all weights are plain.

    Attributes:
        weights: name of a weight -> how it is read.
        hidden: names of tensors that are no weights.
        name: the format, as its tool calls it.
    """

    weights: Mapping[str, QuantisedWeight] = field(default_factory=dict)
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
        ArchitectureError: the checkpoint has a format that cannot be read as weights, or the
            library that reads it is not installed.
    """
    stored, settings = set(names), settings or {}
    method = str(settings.get("quant_method", ""))
    found: dict[str, QuantisedWeight] = {
        **find_four_bit(stored),
        **find_packed(stored, dtypes, settings),
        **find_awq(stored, settings),
    }
    refuse_packed(stored - _tensors_of(found), method)
    found |= find_codes(stored - _tensors_of(found), dtypes, settings)
    unscaled = [n for n, d in dtypes.items() if _is_code(n, d) and n in stored and n not in found]
    if unscaled:
        raise refusal(
            method or "in a format of its own",
            f"{listed(sorted(unscaled))} is {dtypes[min(unscaled)]} without scales beside it",
        )
    if not found:
        return Quantisation()
    if settings.get("transform_config"):
        raise refusal(method, "`transform_config` in its config.json rotates the weights")
    hidden = _tensors_of(found) - found.keys()
    hidden |= {name for name in stored if name.rsplit(".", 1)[-1] in _NO_WEIGHTS}
    return Quantisation(found, frozenset(hidden), method or next(iter(found.values())).form)


def _tensors_of(weights: Mapping[str, QuantisedWeight]) -> set[str]:
    """Names of all tensors that these weights are stored as."""
    return {name for own in weights.values() for name in (own.stored, *own.beside)}


def _is_code(name: str, dtype: str) -> bool:
    """Whether a tensor can be no weight and no buffer by its dtype; masks are integers, too."""
    return dtype.startswith(("F8", "F4")) or (dtype in _NEVER_WEIGHTS and name.endswith(".weight"))
