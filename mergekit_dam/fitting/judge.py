"""The judge: how far the merged model's distribution is from each teacher's.

`KL(teacher k || merged)` on model k's data at temperature 1, in nats per token: what every
fit is after, measured on sequences that took no part in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from mergekit_dam.distributed import totals
from mergekit_dam.fitting.streams import Split, Stream

Logits = Callable[[Tensor], Tensor]
"""From hidden states that leave the last block to logits."""


@dataclass(frozen=True)
class Verdict:
    """Divergences of a merged model from its teachers, in nats per token.

    Attributes:
        losses: per stream.
        weights: loss weight of each stream.
    """

    losses: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the streams, by their loss weights."""
        pairs = zip(self.losses, self.weights, strict=True)
        return sum(loss * weight for loss, weight in pairs) / sum(self.weights)


def divergence(merged: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`KL(teacher || merged)` of logits `[..., vocabulary]`, per token.

    Tokens that the teacher does not have (logits of -inf) get no probability by it: what the merged
    model gives them counts as missing from those that the teacher has.
    """
    wanted = log_softmax(teacher.float() / temperature, dim=-1)
    got = log_softmax(merged.float() / temperature, dim=-1)
    gap = torch.where(wanted.isneginf(), 0.0, wanted - got)  # 0 * inf would be nan
    return (wanted.exp() * gap).sum(-1)


class Divided(Protocol):
    """Sequences of which the last so many are held out, in one process or another."""

    @property
    def held_out(self) -> int: ...


def judging_split(data: Sequence[Divided]) -> Split:
    """Held-out data where every model has some, else that of the fit."""
    return "held_out" if all(own.held_out for own in data) else "fit"


@torch.no_grad()
def judge(
    streams: Sequence[Stream],
    merged: Logits,
    teachers: Mapping[int, Logits],
    weights: Sequence[float],
    device: torch.device,
) -> Verdict:
    """Judge a merged model by what left its last block and its teachers' last blocks.

    Args:
        merged: logits of the merged model.
        teachers: logits of each stream's teacher, by source.
        weights: loss weight of each stream.
    """
    split = judging_split(streams)
    sums = []
    for stream in streams:
        teacher = teachers[stream.source]
        first, last = stream.border(split)
        total = sum(
            # One sequence at a time: logits are large.
            divergence(
                merged(stream.merged[i : i + 1].to(device)),
                teacher(stream.teacher[i : i + 1].to(device)),
            ).mean(dtype=torch.float64)
            for i in range(first, last)
        )
        sums.append(float(total))
    pairs = zip(totals(sums), streams, strict=True)
    return Verdict(tuple(total / own.count(split) for total, own in pairs), tuple(weights))
