"""Sequences that are held out."""

import pytest

from tests.kit.settings import run_settings


@pytest.mark.parametrize(
    ("holdout", "sequences", "expected"),
    [(0.125, 32, 4), (0.125, 2, 1), (0.125, 1, 0), (0.0, 32, 0), (0.9, 4, 3), (0.99, 3, 2)],
)
def test_at_least_one_sequence_is_held_out_and_one_is_left(
    holdout: float, sequences: int, expected: int
) -> None:
    assert run_settings(holdout).held_out(sequences) == expected
