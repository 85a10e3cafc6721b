"""Corrections that do not fit their tensors are told."""

from typing import Any

import pytest
import torch

from mergekit_dam.coefficients.correction import Correction
from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.coefficients.shapes import correction_problem

GOOD: list[tuple[dict[str, Any], tuple[int, ...], int]] = [
    ({"full": (6, 4)}, (6, 4), -1),
    ({"full": (4, 6)}, (6, 4), 0),
    ({"left": (6, 2), "right": (2, 4)}, (6, 4), -1),
    ({"left": (6, 2), "right": (2, 4), "moved_left": (6, 3), "moved_right": (3, 4)}, (6, 4), -1),
    ({"left": (3, 6, 2), "right": (3, 2, 4)}, (3, 6, 4), -1),
    ({"full": (3, 4, 6)}, (3, 6, 4), 1),
]
BAD: list[tuple[dict[str, Any], tuple[int, ...], str]] = [
    ({"full": (4, 6)}, (6, 4), r"shape \[6, 4\], got \[4, 6\] for `full`"),
    ({"left": (5, 2), "right": (2, 4)}, (6, 4), r"shape \[6, 2\], got \[5, 2\] for `left`"),
    ({"left": (6, 2), "right": (3, 4)}, (6, 4), r"shape \[2, 4\], got \[3, 4\] for `right`"),
    ({"left": (6, 2)}, (6, 4), "`right` is missing"),
    ({"moved_right": (2, 4)}, (6, 4), "`moved_left` is missing"),
    ({"left": (), "right": (2, 4)}, (6, 4), "for `left`"),
    ({"full": (6, 4)}, (3, 6, 4), r"shape \[3, 6, 4\], got \[6, 4\]"),
    ({"full": (6,)}, (6,), "is no matrix"),
    ({"whole": (6, 4)}, (6, 4), "`whole`, which is none of full, left"),
]


@pytest.mark.parametrize(("shapes", "weight", "axis"), GOOD)
def test_what_can_be_added_is_accepted(
    shapes: dict[str, Any], weight: tuple[int, ...], axis: int
) -> None:
    assert correction_problem(shapes, weight, axis) is None
    correction = Correction(**{field: torch.ones(shape) for field, shape in shapes.items()})
    merge_weights([torch.ones(weight)], torch.ones(1, 1), axis=axis, correction=correction)


@pytest.mark.parametrize(("shapes", "weight", "message"), BAD)
def test_what_cannot_be_added_is_told(
    shapes: dict[str, Any], weight: tuple[int, ...], message: str
) -> None:
    problem = correction_problem(shapes, weight)
    assert problem is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)
