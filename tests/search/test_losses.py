"""The loss between logits: by hand, by torch's distributions, and as the reference has it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import kl_div, log_softmax, mse_loss, softmax

from mergekit_dam.search.losses import logit_loss
from tests.kit.settings import logits_settings
from tests.kit.tensors import randn

INF = math.inf
EVERYTHING: dict[str, Any] = {"temperature": 2.0, "mse": 0.3, "entropy": 0.1}


def random_logits(tokens: int = 12, vocabulary: int = 7, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    merged, teacher = 3 * randn(2, tokens, vocabulary, seed=seed).double()
    return merged, teacher


def gradient(merged: Tensor, teacher: Tensor, **changes: Any) -> Tensor:
    leaf = merged.clone().requires_grad_()
    (found,) = torch.autograd.grad(logit_loss(leaf, teacher, logits_settings(**changes)), leaf)
    return found


def test_the_divergence_of_two_coins_is_that_worked_out_by_hand() -> None:
    teacher = torch.tensor([[0.75, 0.25]]).log()
    merged = torch.tensor([[0.5, 0.5]]).log()
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(logit_loss(merged, teacher, logits_settings())) == pytest.approx(by_hand)


def test_temperature_flattens_the_distributions_and_scales_the_loss() -> None:
    teacher = torch.tensor([[0.9, 0.1]]).log()
    merged = torch.zeros(1, 2)
    # At temperature 2 the odds 9 : 1 become 3 : 1.
    by_hand = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    loss = logit_loss(merged, teacher, logits_settings(temperature=2.0))
    assert float(loss) == pytest.approx(by_hand)


def test_squared_difference_and_entropy_are_added_with_their_weights() -> None:
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    shifted = logits + torch.tensor([1.0, 3.0])[:, None]  # no change of the distributions
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2)
    squares = 1.0 + 9.0
    loss = logit_loss(shifted, logits, logits_settings(mse=0.5, entropy=0.1))
    assert float(loss) == pytest.approx((0.5 * squares + 0.1 * entropy) / 2, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_divergence_agrees_with_torch_distributions(temperature: float) -> None:
    merged, teacher = random_logits()
    expected = kl_divergence(
        Categorical(logits=teacher / temperature), Categorical(logits=merged / temperature)
    )
    loss = logit_loss(merged, teacher, logits_settings(temperature=temperature))
    torch.testing.assert_close(loss, temperature**2 * expected.mean())


def test_every_term_is_that_of_the_reference_up_to_its_division_by_the_batch() -> None:
    batch, length, temperature, weight_mse, weight_entropy = 3, 4, 2.0, 0.3, 0.1
    merged, teacher = (logits.unflatten(0, (batch, length)) for logits in random_logits())
    tokens = batch * length
    divergence = kl_div(
        log_softmax(merged / temperature, -1),
        softmax(teacher / temperature, -1),
        reduction="batchmean",
    )
    divergence *= temperature**2 / tokens
    squares = weight_mse * mse_loss(merged, teacher, reduction="none").mean(-1).sum() / tokens
    q = softmax(merged / temperature, -1)
    entropy = -(q * (q + 1e-9).log()).sum() * temperature**2 * weight_entropy / tokens
    loss = logit_loss(merged.flatten(0, 1), teacher.flatten(0, 1), logits_settings(**EVERYTHING))
    torch.testing.assert_close(loss, batch * divergence + squares + entropy, rtol=1e-7, atol=0)


def test_the_gradient_of_the_divergence_is_the_difference_of_probabilities() -> None:
    merged, teacher = random_logits()
    expected = 2.0 / 12 * (softmax(merged / 2, -1) - softmax(teacher / 2, -1))
    torch.testing.assert_close(gradient(merged, teacher, temperature=2.0), expected)


def test_the_gradient_agrees_with_finite_differences() -> None:
    merged, teacher = random_logits(3, 4)
    settings = logits_settings(**EVERYTHING)
    assert torch.autograd.gradcheck(
        lambda logits: logit_loss(logits, teacher, settings), (merged.requires_grad_(),)
    )


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["kl", "everything"])
def test_chunks_of_tokens_add_up_to_the_whole(changes: dict[str, Any]) -> None:
    merged, teacher = random_logits()
    settings = logits_settings(**changes)
    parts = [
        logit_loss(m, t, settings, total_tokens=12)
        for m, t in zip(merged.split([5, 1, 6]), teacher.split([5, 1, 6]), strict=True)
    ]
    torch.testing.assert_close(sum(parts), logit_loss(merged, teacher, settings))


def test_a_model_that_is_its_teacher_loses_nothing() -> None:
    _, teacher = random_logits()
    assert float(logit_loss(teacher, teacher, logits_settings(mse=1.0))) == 0
    assert gradient(teacher, teacher, mse=1.0).abs().max() < 1e-15


@pytest.mark.parametrize("padding", [-INF, torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_padding_of_the_vocabulary_changes_nothing(padding: float, temperature: float) -> None:
    merged, teacher = (logits.float() for logits in random_logits())
    pad = torch.full((12, 3), padding)
    wide, wide_teacher = (torch.cat([logits, pad], dim=1) for logits in (merged, teacher))
    for entropy in (0.0, 0.1):
        settings = logits_settings(temperature=temperature, entropy=entropy)
        torch.testing.assert_close(
            logit_loss(wide, wide_teacher, settings), logit_loss(merged, teacher, settings)
        )
        found = gradient(wide, wide_teacher, temperature=temperature, entropy=entropy)
        expected = gradient(merged, teacher, temperature=temperature, entropy=entropy)
        torch.testing.assert_close(found, torch.cat([expected, torch.zeros(12, 3)], dim=1))
    # The squared difference is a mean over the whole vocabulary, padding included.
    settings = logits_settings(temperature=temperature)
    expected = logit_loss(merged, teacher, settings) + (merged - teacher).square().mean() * 7 / 10
    settings = logits_settings(temperature=temperature, mse=1.0)
    torch.testing.assert_close(logit_loss(wide, wide_teacher, settings), expected)
    assert gradient(wide, wide_teacher, temperature=temperature, mse=1.0).isfinite().all()


def test_tokens_that_only_the_teacher_rules_out_cost_a_finite_loss() -> None:
    merged, teacher = random_logits()
    teacher[:, 0] = -INF
    expected = kl_divergence(
        Categorical(probs=softmax(teacher, -1)), Categorical(logits=merged)
    ).mean()
    torch.testing.assert_close(logit_loss(merged, teacher, logits_settings()), expected)
    assert gradient(merged, teacher).isfinite().all()
    # The squared difference leaves it out, and is a mean over the whole vocabulary still.
    squares = (merged - teacher)[:, 1:].square().sum() / merged.numel()
    found = logit_loss(merged, teacher, logits_settings(mse=1.0))
    torch.testing.assert_close(found, expected + squares)
    assert gradient(merged, teacher, mse=1.0).isfinite().all()


def test_tokens_that_only_the_merged_model_rules_out_cost_an_infinite_loss_but_no_nan() -> None:
    merged, teacher = random_logits()
    merged[:, 0] = -INF
    assert float(logit_loss(merged, teacher, logits_settings())) == INF
    assert gradient(merged, teacher).isfinite().all()
    # So improbable that fp32 has no number for it, it does not count.
    teacher[:, 0] = -500
    assert logit_loss(merged.float(), teacher.float(), logits_settings()).isfinite()


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    merged = torch.tensor([[1e4, 0.0]])
    teacher = torch.tensor([[0.0, 1e4]])
    settings = logits_settings(entropy=1.0)
    assert float(logit_loss(merged, teacher, settings)) == pytest.approx(1e4)
    assert gradient(merged, teacher, entropy=1.0).isfinite().all()
