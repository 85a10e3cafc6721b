"""The loss between the merged model's logits and a teacher's (arXiv 2410.08371)."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from mergekit_dam.fitting.divergence import expectation_terms
from mergekit_dam.parameters import RunParameters


def logit_loss(
    merged: Tensor, teacher: Tensor, settings: RunParameters, *, total_tokens: int | None = None
) -> Tensor:
    """`T^2 KL(teacher || merged) + mse * squared difference + entropy * T^2 H(merged)`.

    The KL and the entropy H use the distributions at temperature T. The squared difference uses
    the plain logits and is averaged over the vocabulary. The units are nats, or squared logits,
    per token. The teacher gives no probability to tokens that it does not have (logits of -inf),
    and the squared difference leaves them out.

    The reference (arcee-ai/DAM) also divides its KL, and only its KL, by the number of sequences
    in the batch: with more than one, its `mse` and `entropy` weigh that much more. It also adds
    1e-9 to the probabilities of the entropy.

    Args:
        merged: logits fp32 `[tokens, vocabulary]`, differentiable.
        teacher: logits of the same shape; borrowed. Tokens may be ruled out by -inf, here or in
            both; neither the loss nor its gradient is nan then.
        settings: weights of the terms, and the temperature.
        total_tokens: divisor of the sum over tokens. If these tokens are a chunk of a batch, pass
            the batch's number, so that the chunks' losses add up. None: the number of `merged`.

    Returns:
        A scalar.
    """
    temperature = settings.temperature
    log_merged = log_softmax(merged / temperature, dim=-1)
    log_teacher = log_softmax(teacher / temperature, dim=-1)
    loss = temperature**2 * expectation_terms(log_teacher, log_teacher - log_merged).sum()
    if settings.mse:
        difference = torch.where(teacher.isneginf(), 0.0, merged - teacher)
        loss = loss + settings.mse * difference.square().mean(dim=-1).sum()
    if settings.entropy:
        entropy = expectation_terms(log_merged, -log_merged).sum()
        loss = loss + settings.entropy * temperature**2 * entropy
    return loss / (len(merged) if total_tokens is None else total_tokens)
