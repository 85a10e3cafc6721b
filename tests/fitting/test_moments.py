"""Sums over tokens against the same quantities computed from all the data at once."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.features import FeatureMoments
from mergekit_dam.fitting.moments import InputMoments, LinearMoments, LinearTokens
from tests.kit.tensors import CPU

WEIGHTS = torch.rand(30, generator=torch.Generator().manual_seed(9))
CHUNKINGS = [(30,), (1, 29), (10, 10, 10), (1,) * 30]


def data(*sizes: int, tokens: int = 30, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, size, generator=generator) for size in sizes]


def linear_moments(
    x: Tensor, y: Tensor, output: Tensor, chunks: Sequence[int] = (30,)
) -> LinearMoments:
    sums = LinearMoments.zeros(y.shape[1], InputMoments.zeros(x.shape[1], CPU))
    for x_part, y_part, output_part, weight in _parts(chunks, x, y, output):
        sums.inputs.add(x_part, weight)
        sums.add(x_part, y_part, output_part, weight)
    return sums


def linear_tokens(
    x: Tensor, y: Tensor, output: Tensor, chunks: Sequence[int] = (30,)
) -> LinearTokens:
    tokens = LinearTokens()
    for parts in _parts(chunks, x, y, output):
        tokens.add(*parts)
    return tokens


def _parts(chunks: Sequence[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(chunks) for t in (*tensors, WEIGHTS)), strict=True)


def feature_moments(
    n: Tensor, y: Tensor, output: Tensor, chunks: Sequence[int] = (30,)
) -> FeatureMoments:
    sums = FeatureMoments.zeros(n.shape[1], CPU)
    for parts in _parts(chunks, n, y, output):
        sums.add(*parts)
    return sums


@pytest.mark.parametrize("chunks", CHUNKINGS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_error_is_the_squared_distance_to_the_targets(
    chunks: tuple[int, ...], with_bias: bool
) -> None:
    x, y, output = data(6, 4, 4)
    weight = torch.randn(4, 6, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if with_bias else None
    direct = x.double() @ weight.T + (0 if bias is None else bias) - y.double()
    expected = float((WEIGHTS @ direct.square().float()).sum())
    for sums in (linear_moments(x, y, output, chunks), linear_tokens(x, y, output, chunks)):
        assert sums.error(weight, bias) == pytest.approx(expected, rel=1e-5)
        assert sums.energy == pytest.approx(float((WEIGHTS @ output.square()).sum()))
        assert sums.count == pytest.approx(float(WEIGHTS.sum()))
        sums.scale = 3.0
        assert sums.error(weight, bias) == pytest.approx(3 * expected, rel=1e-5)


@pytest.mark.parametrize("chunks", CHUNKINGS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_feature_error_is_the_squared_distance_to_the_targets(
    chunks: tuple[int, ...], with_bias: bool
) -> None:
    n, y, output = data(5, 5, 5)
    weight = torch.randn(5, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None
    direct = n.double() * weight + (0 if bias is None else bias) - y.double()
    sums = feature_moments(n, y, output, chunks)
    expected = float((WEIGHTS.double() @ direct.square()).sum())
    assert sums.error(weight, bias) == pytest.approx(expected, rel=1e-9)
    assert sums.energy == pytest.approx(float((WEIGHTS @ output.square()).sum()))


@pytest.mark.parametrize("chunks", CHUNKINGS)
def test_chunking_does_not_matter(chunks: tuple[int, ...]) -> None:
    x, y, output = data(6, 4, 4)
    whole, parts = linear_moments(x, y, output), linear_moments(x, y, output, chunks)
    for name in ("cross", "y_sum"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-5)
    for name in ("gram", "x_sum"):
        one, other = getattr(parts.inputs, name), getattr(whole.inputs, name)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_perfect_weight_has_no_error_left_and_never_a_negative_one() -> None:
    (x,) = data(6)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    y = x @ weight.T + bias
    sums = linear_moments(x, y, y)
    assert 0 <= sums.error(weight.double(), bias.double()) < 1e-5 * sums.energy


def test_scaled_sums_weight_the_tokens_of_each_model() -> None:
    (x, y, output), (x2, y2, output2) = data(6, 4, 4), data(6, 4, 4, seed=1)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4).double()
    first, second = linear_moments(x, y, output), linear_moments(x2, y2, output2)
    both = first.scaled(0.25)
    both.add_scaled(second, 3.0)
    expected = 0.25 * first.error(weight, bias) + 3 * second.error(weight, bias)
    assert both.error(weight, bias) == pytest.approx(expected, rel=1e-9)
    assert both.count == pytest.approx(3.25 * float(WEIGHTS.sum()))

    n, n2 = feature_moments(x, x, x), feature_moments(x2, x, x)
    features = n.scaled(0.25)
    features.add_scaled(n2, 3.0)
    scale = torch.randn(6).double()
    expected = 0.25 * n.error(scale, scale) + 3 * n2.error(scale, scale)
    assert features.error(scale, scale) == pytest.approx(expected, rel=1e-9)


def test_losses_are_fractions_of_the_teachers_energy() -> None:
    """Sums scaled by loss weight over energy: predicting nothing at all has loss 1."""
    x, y = data(6, 4)
    moments = linear_moments(x, y, y)
    scaled = moments.scaled(2.0 / float(moments.energy))
    evidence = Evidence([scaled], [scaled], total=2.0)
    losses = evidence.losses(torch.zeros(4, 6), None)
    assert losses.fit == pytest.approx(1.0)
    assert losses.held_out == losses.fit


def test_linears_with_one_input_share_its_sums_and_scaled_copies_do_not() -> None:
    (x,) = data(6)
    inputs = InputMoments.zeros(6, CPU)
    first, second = (LinearMoments.zeros(4, inputs) for _ in range(2))
    inputs.add(x, WEIGHTS)
    torch.testing.assert_close(inputs.gram.float(), (x * WEIGHTS[:, None]).T @ x)
    assert first.inputs.gram is second.inputs.gram
    before = inputs.gram.clone()
    copy = first.scaled(2.0)
    copy.add_scaled(second, 1.0)
    torch.testing.assert_close(copy.inputs.gram, 3 * before)
    assert inputs.gram.equal(before)


def test_sums_of_what_is_too_large_to_be_factorised_are_fp32() -> None:
    x, y = data(6, 4)
    inputs = InputMoments.zeros(6, CPU, torch.float32)
    sums = LinearMoments.zeros(4, inputs)
    inputs.add(x, WEIGHTS)
    sums.add(x, y, y, WEIGHTS)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4)
    assert (inputs.gram.dtype, sums.cross.dtype) == (torch.float32, torch.float32)
    assert sums.residual(weight, bias).dtype == torch.float32
    expected = linear_moments(x, y, y)
    assert sums.error(weight, bias) == pytest.approx(expected.error(weight, bias), rel=1e-4)


def test_the_residual_is_what_a_weight_leaves_unexplained() -> None:
    x, y = data(6, 4)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4).double()
    left = y.double() - x.double() @ weight.T - bias
    expected = (left * WEIGHTS[:, None]).T @ x.double()
    found = linear_moments(x, y, y).residual(weight, bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
