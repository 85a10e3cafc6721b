"""From learned values to coefficients and back."""

import math
from typing import get_args

import pytest
import torch

from mergekit_dam.choices import Nonlinearity
from mergekit_dam.errors import ConfigError
from mergekit_dam.search.coordinates import apply, invert

NAMES: tuple[Nonlinearity, ...] = get_args(Nonlinearity)
BY_HAND = {
    "none": lambda x: x,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_values_are_mapped_as_the_name_says(name: Nonlinearity) -> None:
    raw = torch.tensor([-2.0, -0.5, 0.0, 0.3, 4.0], dtype=torch.float64)
    expected = [BY_HAND[name](x) for x in raw.tolist()]
    assert apply(name, raw).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_gives_back_every_start_in_range(
    name: Nonlinearity, dtype: torch.dtype
) -> None:
    starts = [[1e-3, 1 / 3], [0.5, 0.999]]
    if name in ("none", "tanh"):
        starts.append([-0.7, 0.0])
    if name in ("none", "relu"):
        starts.append([7.0, 0.0])
    value = torch.tensor(starts, dtype=dtype)
    raw = invert(name, value)
    assert raw.dtype == dtype
    torch.testing.assert_close(apply(name, raw), value)


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("tanh", 1.0),
        ("tanh", -1.0),
        ("tanh", 1 - 1e-7),
        ("tanh", 1.5),
        ("sigmoid", 0.0),
        ("sigmoid", 1.0),
        ("sigmoid", 1e-9),
        ("sigmoid", -0.25),
        ("relu", -0.25),
        ("tanh", math.nan),
        ("sigmoid", math.nan),
        ("relu", -1e-5),
        ("relu", math.nan),
    ],
)
def test_a_start_out_of_range_is_refused_with_the_remedy(
    name: Nonlinearity, outside: float
) -> None:
    with pytest.raises(ConfigError) as caught:
        invert(name, torch.tensor([[0.5, 0.5], [outside, 0.25]]))
    message = str(caught.value)
    assert f"{name} can only give coefficients" in message
    assert f"starts at {outside:g};" in message
    assert "nonlinearity: none" in message


def test_a_zero_that_rounding_made_negative_is_zero_to_relu() -> None:
    assert invert("relu", torch.tensor([-1e-9, 0.0, 0.5])).tolist() == [0, 0, 0.5]
