"""The judge: how far the merged model's distribution is from each teacher's.

The measure is `KL(teacher k || merged)` on model k's data at temperature 1, in nats per token.
Every fit aims at it. It is measured on sequences that took no part in the fit.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.fitting.divergence import divergence
from mergekit_dam.search.backprop import forward
from mergekit_dam.search.text_loss import next_token_loss
from mergekit_dam.sources.network import Network
from mergekit_dam.streams.distributed import all_sums
from mergekit_dam.streams.share import judging_split
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream

Logits = Callable[[Tensor], Tensor]
"""From the hidden states that leave the last block to logits."""


@dataclass(frozen=True)
class Verdict:
    """Divergences of a merged model from its teachers, in nats per token.

    Attributes:
        losses: divergence on each stream.
        weights: loss weight of each stream.
        text_losses: loss of the next token on each stream's text, in nats per token, of its
            teacher and of the merged model; empty where they were not asked for.
    """

    losses: tuple[float, ...]
    weights: tuple[float, ...]
    text_losses: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of_state(cls, state: Mapping[str, Sequence[float]]) -> "Verdict":
        """The verdict whose fields, as plain values, are these."""
        return cls(tuple(state["losses"]), tuple(state["weights"]))

    @property
    def mean(self) -> float:
        """Mean over the streams, weighted by their loss weights."""
        pairs = zip(self.losses, self.weights, strict=True)
        return sum(loss * weight for loss, weight in pairs) / sum(self.weights)

    @property
    def numbers(self) -> dict[str, float | Sequence[float]]:
        """The divergences by name, for what tracks the merge."""
        return {"KL": self.losses, "mean KL": self.mean}

    def better_than(self, other: "Verdict", allowance: float = math.inf) -> bool:
        """Whether the mean is lower, and no model that counts pays too much for it.

        Args:
            allowance: rise of one model's divergence that a lower mean may cost, in nats per token.
        """
        every = zip(self.losses, other.losses, self.weights, strict=True)
        paid = any(own - was > allowance for own, was, weight in every if weight)
        return self.mean < other.mean and not paid


@torch.no_grad()
def judge(
    streams: Sequence[Stream],
    merged: Logits,
    teachers: Callable[[int], Logits],
    weights: Sequence[float],
    device: torch.device,
    *,
    texts: Sequence[Sequences] = (),
) -> Verdict:
    """Judge a merged model from the hidden states that left its and its teachers' last blocks.

    Args:
        streams: hidden states of both models, per model with calibration data.
        merged: computes the logits of the merged model.
        teachers: gives what computes the logits of a source's own model; one is used at a time.
        weights: loss weight of each stream.
        device: device on which the logits are computed.
        texts: token ids of each stream, if losses of the next token are asked for.
    """
    split = judging_split(stream.share for stream in streams)
    sums, text_sums = list[float](), list[float]()
    for index, stream in enumerate(streams):
        teacher = teachers(stream.source)
        first, last = stream.share.rows(split)
        total = torch.zeros((), dtype=torch.float64, device=device)
        predicted = torch.zeros(3, dtype=torch.float64)
        for i in range(first, last):  # one sequence at a time: logits are large
            tokens, weight = stream.counted_tokens(i)
            if weight:
                ours = merged(stream.merged[i : i + 1][:, tokens].to(device))
                theirs = teacher(stream.teacher[i : i + 1][:, tokens].to(device))
                total += weight * divergence(ours, theirs).mean(dtype=torch.float64)
                if texts:
                    ids = texts[index][i : i + 1][0].cpu()
                    own, count = next_token_loss(theirs[0], ids, tokens)
                    other, _ = next_token_loss(ours[0], ids, tokens)
                    predicted += torch.tensor([own, other, count], dtype=torch.float64)
        del teacher  # before the next one's weights are copied
        sums.append(float(total))
        text_sums += predicted.tolist()
    totals = all_sums([*sums, *text_sums])
    pairs = zip(totals[: len(streams)], streams, strict=True)
    losses = tuple(total / own.share.count(split) for total, own in pairs)
    text_losses = zip(*(iter(totals[len(streams) :]),) * 3, strict=True)
    known = tuple((own / n, other / n) for own, other, n in text_losses if n)
    return Verdict(losses, tuple(weights), known)


def judged_by(streams: Sequence[Stream]) -> list[Stream]:
    """Of every stream, the sequences that judge a merged model as a whole."""
    split = judging_split(stream.share for stream in streams)
    return [stream.of(split) for stream in streams]


def verdict_of(network: Network, point: MergeRecord, data: Sequence[Stream]) -> Verdict:
    """Judge a merged model; runs only the sequences that judge it."""
    kept = judged_by(data)
    hidden = forward(
        network, lambda _, opened: opened.merged_weights(point), [own.merged[:] for own in kept]
    )
    return judged_at_output(network, point, kept, hidden)


def judged_at_output(
    network: Network,
    point: MergeRecord,
    data: Sequence[Stream],
    hidden: Sequence[Sequences],
    *,
    texts: bool = False,
) -> Verdict:
    """Judge a merged model from the hidden states that left its last block.

    Args:
        network: the stages of the model.
        point: the coefficients.
        data: tokens that judge, and the hidden states that left the teachers' last blocks.
        hidden: hidden states that left the merged model's last block.
        texts: whether the losses of the next token are asked for, too.
    """
    opened = network.output()
    weights = opened.merged_weights(point)

    def teacher(source: int) -> Logits:
        own = opened.teacher_weights(source)
        return lambda x: opened.teacher_part(source).run(own, x)

    return judge(
        [dataclasses.replace(own, merged=x) for own, x in zip(data, hidden, strict=True)],
        lambda x: opened.part.run(weights, x),
        teacher,
        [network.loss_weights[own.source] for own in data],
        network.device,
        texts=[own.merged for own in data] if texts else (),
    )
