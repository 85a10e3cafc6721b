"""The divergence that judges a merged model, where a teacher does not have all of its tokens."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

from mergekit_dam.fitting.divergence import divergence
from mergekit_dam.model.part import Part, without_tokens
from tests.kit.tensors import randn


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_it_is_that_of_the_distributions(temperature: float) -> None:
    merged, teacher = randn(2, 5, 7).double()
    expected = kl_divergence(
        Categorical(logits=teacher / temperature), Categorical(logits=merged / temperature)
    )
    found = divergence(merged, teacher, temperature=temperature)
    torch.testing.assert_close(found, expected.float())


def test_mass_on_tokens_that_a_teacher_lacks_is_missing_from_the_others() -> None:
    merged, teacher = randn(2, 5, 7).double()
    unknown = torch.tensor([False, True, False, False, True, False, False])
    part = Part("output", "", nn.Identity(), lambda _, hidden: hidden)
    ruled_out = without_tokens(part, unknown).run({}, teacher)
    assert ruled_out[:, unknown].isneginf().all()
    torch.testing.assert_close(ruled_out[:, ~unknown], teacher[:, ~unknown].float())
    known = ~unknown
    among_known = kl_divergence(
        Categorical(logits=teacher[:, known]), Categorical(logits=merged[:, known])
    )
    missing = -merged.softmax(-1)[:, known].sum(-1).log()
    merged.requires_grad_(True)
    found = divergence(merged, ruled_out)
    torch.testing.assert_close(found, (among_known + missing).float())
    found.sum().backward()
    assert merged.grad is not None
    assert merged.grad.isfinite().all()
    assert (merged.grad[:, unknown] > 0).all()  # less of them would be better
