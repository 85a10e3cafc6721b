"""The KL divergence between two distributions over the vocabulary."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def divergence(merged: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`KL(teacher || merged)` of logits `[..., vocabulary]`, in nats per token.

    A token that the teacher does not have (its logit is -inf) has probability 0 there. Probability
    that the merged model gives to it is missing from the other tokens, and so increases the result.
    """
    wanted = log_softmax(teacher.float() / temperature, dim=-1)
    got = log_softmax(merged.float() / temperature, dim=-1)
    return expectation_terms(wanted, wanted - got).sum(-1)


def expectation_terms(log_probability: Tensor, value: Tensor) -> Tensor:
    """The terms `p * value` of an expected value, in the shape of both arguments.

    A term with probability 0 is 0 even if its value is infinite: 0 * inf would be nan, here and in
    the gradient.
    """
    probability = log_probability.exp()
    return probability * torch.where(probability > 0, value, 0.0)
