"""Checks of a file of coefficients: anybody may have changed it, or another program written it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mergekit_dam.errors import first_line
from mergekit_dam.untrusted import parsed_json

_AXES = range(-3, 3)
"""Dimensions of a weight; fused experts have three."""


_KINDS = {
    "parameters": dict,
    "versions": dict,
    "revisions": dict,
    "calibration_sha256": dict,
    "edited": list,
    "corrections": str,
}
"""Types of the entries of the provenance that commands compare and print."""


class WrongFileError(ValueError):
    """What is wrong with a file, for a message that names it."""


def provenance_of(text: str | None) -> dict[str, Any]:
    """The provenance of a file, from the text in its metadata.

    The entries that this package reads are of their types.

    Raises:
        WrongFileError: If there is none, or its entries are of other types.
    """
    if text is None:
        raise WrongFileError("its metadata has no entry of this package")
    try:
        found = parsed_json(text)
    except ValueError as error:
        raise WrongFileError(f"its metadata is no JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise WrongFileError(f"its metadata is a {type(found).__name__}, not an object")
    sources, axes = found.get("sources"), found.get("axes", {})
    if not isinstance(sources, list) or not sources:
        raise WrongFileError("its metadata has no list of `sources`")
    if not all(isinstance(source, str) for source in sources):
        raise WrongFileError("`sources` in its metadata are not names")
    if len(set(sources)) < len(sources):
        raise WrongFileError("`sources` in its metadata name a model twice")
    if not isinstance(axes, dict) or not all(type(axis) is int for axis in axes.values()):
        raise WrongFileError("`axes` in its metadata are not whole numbers by tensor")
    wrong = next((name for name, axis in axes.items() if axis not in _AXES), None)
    if wrong is not None:
        raise WrongFileError(f"`axes` in its metadata has dimension {axes[wrong]} for {wrong}")
    _check_kinds(found)
    return found


def _check_kinds(found: Mapping[str, Any]) -> None:
    """Check the types of what commands compare and print."""
    for key, kind in _KINDS.items():
        if key in found and not isinstance(found[key], kind):
            raise WrongFileError(f"`{key}` in its metadata is a {type(found[key]).__name__}")
    if not _are_identities(found.get("identities", {})):
        raise WrongFileError("`identities` in its metadata are not digests by model and file")


def _are_identities(found: Any) -> bool:
    """Whether a value is a mapping of texts to mappings of texts to texts."""
    return isinstance(found, dict) and all(
        isinstance(own, dict) and all(isinstance(digest, str) for digest in own.values())
        for own in found.values()
    )


def check_headers(headers: Mapping[str, tuple[Sequence[int], str]], sources: int) -> None:
    """Check the shapes and dtypes of coefficients before they are read.

    Args:
        headers: Output tensor's name -> shape and dtype, as safetensors names it.
        sources: Number of sources.

    Raises:
        WrongFileError: If a tensor is not fp32 `[sources, n]`.
    """
    if not headers:
        raise WrongFileError("it has no coefficients")
    for name, (shape, dtype) in headers.items():
        if len(shape) != 2 or shape[0] != sources or shape[1] < 1:
            raise WrongFileError(
                f"required coefficients of shape [{sources}, n], a row for each of its sources, "
                f"got {list(shape)} for {name}"
            )
        if dtype != "F32":
            raise WrongFileError(f"required coefficients in F32, got {dtype} for {name}")


def check_values(coefficients: Mapping[str, Tensor]) -> None:
    """Check that coefficients are finite.

    Raises:
        WrongFileError: The first that is not, with its tensor, row and column.
    """
    for name, tensor in coefficients.items():
        wrong = (~tensor.isfinite()).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise WrongFileError(
                f"the coefficient of row {row} and column {column} for {name} is "
                f"{tensor[row, column].item()}, not a finite number"
            )
