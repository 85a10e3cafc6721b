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

    KL and entropy H are of the distributions at temperature T; the squared difference is that
    of the plain logits, averaged over the vocabulary. All are nats, or squared logits, per
    token. Tokens that the teacher does not have (logits of -inf) get no probability by it, and
    their logits are compared with nothing.

    The reference (arcee-ai/DAM) divides its KL, and only that, by the number of sequences in
    the batch as well: at more than one its `mse` and `entropy` weigh that much more. It also
    adds 1e-9 to the probabilities of the entropy.

    Args:
        merged: logits fp32 `[tokens, vocabulary]`, differentiable.
        teacher: logits of the same shape; borrowed. Tokens of the vocabulary may be ruled out
            by -inf, here or in both, which costs no nan here or in the gradient.
        total_tokens: what the sum over tokens is divided by, where these are a chunk of more:
            the losses of the chunks then add up to that of the whole. None: their own number.

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
