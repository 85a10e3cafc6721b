"""How well models predict the text by which they are judged: the loss of the next tokens."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def next_token_loss(logits: Tensor, ids: Tensor, tokens: Tensor | slice) -> tuple[float, int]:
    """Sum of `-log p` of the tokens that follow some tokens of a sequence, in nats.

    Args:
        logits: `[tokens, vocabulary]`.
        ids: the whole sequence, int64 `[length]`.
        tokens: places of the tokens in it; the last of a sequence is followed by none.

    Returns:
        (sum, number of tokens that are predicted).
    """
    places = torch.arange(len(ids))[tokens]
    inside = places < len(ids) - 1
    labels = ids[places[inside] + 1].to(logits.device)
    losses = cross_entropy(logits[inside.to(logits.device)].float(), labels, reduction="none")
    return float(losses.sum(dtype=torch.float64)), len(labels)
