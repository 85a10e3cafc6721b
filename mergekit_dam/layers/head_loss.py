"""The loss of the output head: the KL between logits, and its gradient on a few tokens.

The loss is `KL(teacher k's distribution || merged)` on the data of each model k, at the configured
temperature. The merged head acts on the merged stream.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mergekit_dam.coefficients.tensors import TensorSources
from mergekit_dam.fitting.divergence import divergence
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.units import Unit
from mergekit_dam.streams import progress
from mergekit_dam.streams.distributed import all_sums
from mergekit_dam.streams.share import Split, judging_split
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream

P = TypeVar("P")

TOKENS = 64
"""Tokens of every model in one gradient. More steps of few tokens get further than few of many."""

PASSES = 5
"""How often a descent sees the text of the fit, at the most."""

LOOKS = 2
"""Times that a descent is judged on held-out data; the best of them is kept."""

ROUNDING = 1e-6
"""Nats per token by which a loss must fall at least: less is rounding."""


@dataclass(frozen=True)
class HeadLoss:
    """The KL of the merged model, with a weight of its head.

    Attributes:
        walk: the walk through the output part.
        unit: the head.
        temperature: temperature of the logits.
    """

    walk: Walk
    unit: Unit
    temperature: float
    _random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def name(self) -> str:
        """Name of the weight, relative to the part."""
        return self.unit.parameter("weight")

    @property
    def sources(self) -> TensorSources:
        """The weight in all models."""
        return self.walk.sources[self.name]

    @property
    def judging(self) -> Split:
        """The split that judges a weight."""
        return judging_split(stream.share for stream in self.walk.streams)

    def steps(self, most: int) -> int:
        """Steps of a descent on this text, as `steps_for` says."""
        streams = self.walk.streams
        tokens = max(stream.number_counted("fit") for stream in streams)
        return steps_for(most, tokens, streams[0].teacher.shape[1])

    def of(self, head: Tensor) -> float:
        """KL in nats per token on the data that judges, with a weight `[vocabulary, in]`."""
        weights, split = {**self.walk.weights, self.name: head.float()}, self.judging
        loss = 0.0
        for stream in self.walk.streams:
            teacher_weights = self.walk.teacher_weights(stream)
            own = 0.0
            for row in range(*stream.share.rows(split)):
                tokens, weight = stream.counted_tokens(row)
                if weight:
                    wanted = self._teacher(stream, teacher_weights, row, tokens)
                    entering = self._entering(stream.merged, row, tokens)
                    own += weight * float(self._kl(self.walk.part.run(weights, entering), wanted))
            loss += self._weight_of(stream) * own / stream.share.count(split)
        return all_sums([loss])[0]

    def gradient(self, head: Tensor, number: int) -> Tensor:
        """This process's part of the gradient with respect to the weight, fp32, in its shape.

        It is of some tokens that count, drawn at random, of one sequence of every model.

        Args:
            head: the weight, as for `of`.
            number: number of the sequence in the data of the fit; it wraps around at the end.
        """
        drawn = [own for stream in self.walk.streams if (own := self._drawn(stream, number))]
        if not drawn:
            return torch.zeros_like(head, dtype=torch.float32)
        head = head.float().requires_grad_(True)
        weights = {**self.walk.weights, self.name: head}
        wanted, entering = [], []
        for stream, row, tokens, _ in drawn:
            teacher_weights = self.walk.teacher_weights(stream)
            wanted.append(self._teacher(stream, teacher_weights, row, tokens)[0])
            entering.append(self._entering(stream.merged, row, tokens)[0])
        with torch.enable_grad():
            # Together, so that the gradient of the weight is one product; side by side, as one
            # after the other they might be longer than the model has positions.
            logits = self.walk.part.run(weights, pad_sequence(entering, batch_first=True))
            pairs = zip(logits, wanted, strict=True)
            kls = (self._kl(merged[: len(own)], own) for merged, own in pairs)
            shares = (self._weight_of(stream) * weight for stream, _, _, weight in drawn)
            loss = torch.stack([share * kl for share, kl in zip(shares, kls, strict=True)]).sum()
        return torch.autograd.grad(loss, head)[0]

    def _drawn(self, stream: Stream, number: int) -> tuple[Stream, int, Tensor, float] | None:
        """Some tokens of one sequence of a stream: it, the row, tokens, their weight in the loss.

        None where another process has the sequence, or none of its tokens count.
        """
        # Drawn for all sequences, so that every process draws the same.
        tokens = torch.randperm(stream.teacher.shape[1], generator=self._random)
        row = stream.share.row_of(number % stream.share.count("fit"))
        if row is None:
            return None
        counted, weight = stream.counted_tokens(row)
        if isinstance(counted, Tensor):
            tokens = tokens[torch.isin(tokens, counted)]
        return (stream, row, tokens[:TOKENS], weight) if weight else None

    def _weight_of(self, stream: Stream) -> float:
        """Share of a stream's data in the loss."""
        weights = self.sources.settings.loss_weights
        return weights[stream.source] / sum(weights[own.source] for own in self.walk.streams)

    def _teacher(
        self, stream: Stream, weights: Mapping[str, Tensor], row: int, tokens: Tensor | slice
    ) -> Tensor:
        """Logits `[1, tokens, vocabulary]` of a stream's own model for tokens of one sequence."""
        entering = self._entering(stream.teacher, row, tokens)
        return self.walk.teachers[stream.source].run(weights, entering)

    def _entering(self, hidden: Sequences, row: int, tokens: Tensor | slice) -> Tensor:
        """What enters the head's part for tokens of one sequence, on the device."""
        return hidden[row : row + 1][:, tokens].to(self.walk.device)

    def _kl(self, merged: Tensor, teacher: Tensor) -> Tensor:
        """KL in nats per token, averaged over tokens of one sequence."""
        return divergence(merged, teacher, temperature=self.temperature).mean()


def steps_for(most: int, tokens: int, length: int) -> int:
    """Steps of a descent: fewer than `most` where there is little text.

    Args:
        tokens: tokens of the fit that count, of the model that has the most.
        length: tokens of a sequence.
    """
    return min(most, math.ceil(PASSES * tokens / min(TOKENS, length)))


def descent(
    optimizer: torch.optim.Optimizer,
    steps: int,
    gradients: Callable[[int], None],
    shares: tuple[float, float],
) -> Iterator[int]:
    """Steps of an optimiser whose learning rate falls along a cosine.

    Args:
        gradients: puts the gradients of a step into the parameters.
        shares: shares of the fit of the head that are done before and after the descent.

    Yields:
        The number of steps so far, whenever the result is to be looked at.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    begin, end = shares
    for step in range(1, steps + 1):
        share = begin + (end - begin) * step / steps
        progress.show(f"head, step {step}/{steps}", share=share)
        gradients(step - 1)
        optimizer.step()
        schedule.step()
        if step % math.ceil(steps / LOOKS) == 0 or step == steps:
            yield step


@dataclass(frozen=True)
class Lowest(Generic[P]):
    """The best point of a descent.

    Attributes:
        point: the point; None if none was better than the start.
        loss: its loss on the data that judges, or that of the start.
        step: the number of steps that led to it.
    """

    point: P | None
    loss: float
    step: int = 0


def lowest(
    loss: HeadLoss,
    start: float,
    looks: Iterator[int],
    made: Callable[[], P],
    merged: Callable[[P], Tensor],
) -> Lowest[P]:
    """The best of the points that a descent is looked at.

    Args:
        start: loss where the descent begins.
        looks: the descent: the number of steps so far at every look.
        made: makes the point where the descent is.
        merged: makes the weight of a point.
    """
    best: Lowest[P] = Lowest(None, start)
    for step in looks:
        point = made()
        now = loss.of(merged(point))
        if now < best.loss - ROUNDING:
            best = Lowest(point, now, step)
    return best
