"""Every form of the map from unknowns to coefficients."""

import itertools

import torch
from torch import Tensor

from mergekit_dam.coefficients.parametrisation import Parametrisation

WEIGHTS = (1.0, 2.0, 0.5)
FORMS = {
    f"base={base} include={include} sum={sum_to_one}": Parametrisation.create(
        WEIGHTS, base=base, include_base=include, sum_to_one=sum_to_one
    )
    for base, include, sum_to_one in itertools.product((None, 0, 2), (False, True), (False, True))
    if base is not None or not include
}
SUMMING = [name for name in FORMS if "sum=True" in name]


def random_tensors(*shape: int, count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def share_of(name: str) -> Tensor:
    """The weighted average that a form should start from, worked out anew from its name."""
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    for base in (0, 2):
        if f"base={base} include=False" in name:
            weights[base] = 0
    return weights / weights.sum()
