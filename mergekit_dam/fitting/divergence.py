"""How far one distribution over the vocabulary is from another."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def divergence(merged: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`KL(teacher || merged)` of logits `[..., vocabulary]`, in nats per token.

    Tokens that the teacher does not have (logits of -inf) get no probability by it: what the merged
    model gives them counts as missing from those that the teacher has.
    """
    wanted = log_softmax(teacher.float() / temperature, dim=-1)
    got = log_softmax(merged.float() / temperature, dim=-1)
    return expectation_terms(wanted, wanted - got).sum(-1)


def expectation_terms(log_probability: Tensor, value: Tensor) -> Tensor:
    """The terms `p * value` of an expected value, in the shape of both.

    What has no probability counts 0, be its value infinite: 0 * inf would be nan, here and in the
    gradient.
    """
    probability = log_probability.exp()
    return probability * torch.where(probability > 0, value, 0.0)
