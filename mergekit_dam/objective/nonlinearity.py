"""The map from the values that are learned to the coefficients, and its inverse."""

from torch import Tensor

from mergekit_dam.errors import ConfigError
from mergekit_dam.objective.settings import Nonlinearity

_RANGES: dict[Nonlinearity, tuple[float, float]] = {"tanh": (-1, 1), "sigmoid": (0, 1)}

_ROUNDING = 1e-6
"""A start nearer to the edge of a range is at the edge: what is left is rounding in fp32."""


def apply(name: Nonlinearity, raw: Tensor) -> Tensor:
    """Coefficients of learned values, of one shape and dtype, differentiable."""
    if name == "tanh":
        return raw.tanh()
    if name == "sigmoid":
        return raw.sigmoid()
    return raw.relu() if name == "relu" else raw


def invert(name: Nonlinearity, value: Tensor) -> Tensor:
    """The learned values whose coefficients are the given ones, in their shape and dtype.

    A coefficient of 0 under "relu" comes back as 0, where the gradient is 0: it stays there.

    Raises:
        ConfigError: no learned value gives one of the coefficients.
    """
    if name == "relu":
        _require(name, value, value > -_ROUNDING, "of 0 or more")
        return value.clamp_min(0)
    if name in _RANGES:
        low, high = _RANGES[name]
        inside = (value > low + _ROUNDING) & (value < high - _ROUNDING)
        _require(name, value, inside, f"between {low} and {high}")
    if name == "tanh":
        return value.atanh()
    return value.logit() if name == "sigmoid" else value


def _require(name: Nonlinearity, value: Tensor, reached: Tensor, expected: str) -> None:
    """Refuse a start that is not reached."""
    if not reached.all():
        raise ConfigError(
            [
                f"nonlinearity: {name} can only give coefficients {expected}, got one that starts "
                f"at {float(value[~reached][0]):g}; use `nonlinearity: none`, or another start"
            ]
        )
