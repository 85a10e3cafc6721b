"""Formats of quantised weights that are refused, by name."""

from pydantic import ValidationError

from mergekit_dam.errors import ArchitectureError, first_line, listed

_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes, 4 bit, without `.quant_state`",
    ".weight_g_idx": "compressed-tensors, with reordered columns",
    ".bitmask": "compressed-tensors, sparse",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    ".weight_packed": "compressed-tensors, packed in another way than `pack-quantized`",
    "_blocks": "MXFP4",
    ".W_q": "HQQ",
    "._data": "quanto",
}
"""Ends of the names of tensors that only formats write that are refused."""


def refuse_packed(stored: set[str], method: str) -> None:
    """Refuse tensors that only a format writes that cannot be read.

    Args:
        stored: names of the tensors that no reader knows.
        method: `quant_method` of the model's configuration; empty if there is none.

    Raises:
        ArchitectureError: there are some; the message names the format.
    """
    for end, tool in _PACKED.items():
        packed = sorted(name for name in stored if name.endswith(end))
        if end == "_blocks":
            packed = [n for n in packed if n.removesuffix("blocks") + "scales" in stored]
        if packed:
            own = method and not tool.lower().startswith(method)
            raise refusal(f"{method}: {tool}" if own else tool, f"packed: {listed(packed)}")


def refusal(form: str, found: str) -> ArchitectureError:
    """The error that weights cannot be read.

    Args:
        form: the format in words.
        found: what was found, and in which tensors.
    """
    return ArchitectureError(
        f"required plain weights, codes of 8 bits with their scales, or 4 bits of bitsandbytes, "
        f"compressed-tensors or AWQ, got a quantised model ({form}): {found}. Merge the model that "
        f"it was quantised from"
    )


def reason(error: Exception) -> str:
    """What is wrong with values that somebody wrote, in one line."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors()[0]
    return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
