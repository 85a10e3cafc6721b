"""Standard errors against formulas and against repeated draws."""

import math

import pytest
import torch

from mergekit_dam.evaluation.losses import Measured, average_of, mean, recovery


def drawn(count: int, seed: int) -> list[torch.Tensor]:
    """Losses of an average, a merge and a specialist on sequences that are hard for all."""
    generator = torch.Generator().manual_seed(seed)
    hard = torch.randn(count, dtype=torch.float64, generator=generator)
    noise = 0.1 * torch.randn(3, count, dtype=torch.float64, generator=generator)
    return [3.0 + hard + noise[0], 2.3 + hard + noise[1], 2.0 + hard + noise[2]]


def test_the_error_of_a_mean_is_its_deviation_over_repeated_draws() -> None:
    found = [mean(drawn(40, seed)[0]) for seed in range(400)]
    spread = torch.tensor([own.value for own in found]).std().item()
    assert math.isclose(spread, sum(own.error or 0 for own in found) / 400, rel_tol=0.15)


def test_a_paired_difference_knows_more_than_two_means() -> None:
    average, merged, _ = drawn(40, 0)
    apart = math.hypot(mean(average).error or 0, mean(merged).error or 0)
    assert (mean(merged - average).error or 0) < apart / 5


def test_recovery_is_the_share_of_the_advantage_and_its_error_that_of_repeated_draws() -> None:
    found = []
    for seed in range(400):
        average, merged, own = drawn(40, seed)
        measured = recovery(merged, average, own)
        assert measured is not None
        expected = (average.mean() - merged.mean()) / (average.mean() - own.mean())
        assert math.isclose(measured.value, expected.item())
        found.append(measured)
    spread = torch.tensor([own.value for own in found]).std().item()
    assert math.isclose(spread, sum(own.error or 0 for own in found) / 400, rel_tol=0.15)


def test_the_average_recovers_nothing_and_the_specialist_everything() -> None:
    average, _, own = drawn(10, 0)
    assert recovery(average, average, own) == Measured(0.0, 0.0)
    whole = recovery(own, average, own)
    assert whole is not None
    assert whole.value == pytest.approx(1)
    assert whole.error == pytest.approx(0, abs=1e-12)


def test_a_specialist_without_an_advantage_has_no_recovery() -> None:
    average, merged, _ = drawn(10, 0)
    assert recovery(merged, average, average) is None


def test_one_sequence_has_no_error() -> None:
    assert mean(torch.tensor([2.0])) == Measured(2.0, None)
    assert Measured(2.0, None).perplexity == Measured(math.exp(2.0), None)


def test_the_error_of_a_perplexity_is_to_first_order() -> None:
    loss, step = Measured(2.0, 0.01), 1e-4
    slope = (math.exp(2.0 + step) - math.exp(2.0 - step)) / (2 * step)
    assert loss.perplexity.error == pytest.approx(0.01 * slope)


def test_a_mean_over_texts_has_the_error_of_independent_texts() -> None:
    assert average_of([Measured(1.0, 0.3), Measured(2.0, 0.4)]) == Measured(1.5, 0.25)
    assert average_of([Measured(1.0, 0.3), None]) is None
    assert average_of([Measured(1.0, None), Measured(3.0, 0.4)]) == Measured(2.0, None)
