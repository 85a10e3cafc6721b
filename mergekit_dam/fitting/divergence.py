"""TODO mergekit_dam/fitting/divergence.py."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def divergence(merged: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`KL(teacher || merged)` of logits `[..., vocabulary]`, per token.

    Tokens that the teacher does not have (logits of -inf) get no probability by it: what the merged
    model gives them counts as missing from those that the teacher has.
    """
    wanted = log_softmax(teacher.float() / temperature, dim=-1)
    got = log_softmax(merged.float() / temperature, dim=-1)
    gap = torch.where(wanted.isneginf(), 0.0, wanted - got)  # 0 * inf would be nan
    return (wanted.exp() * gap).sum(-1)
