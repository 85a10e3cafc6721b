"""Loss and gradient of the end-to-end objective, one stage in memory at a time.

`sum_k w_k loss_k`, with `loss_k` between the merged model's logits on model k's data and
model k's own. What every source contributes is read twice a step, once forward and once
backward; of the gradients, only those of the coefficients are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import coefficient_gradient
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.backprop import Gradients, Weights, add_gradients, backward, forward
from mergekit_dam.search.coordinates import Coordinate
from mergekit_dam.search.losses import logit_loss
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.distributed import all_sum, all_sums
from mergekit_dam.streams.stream import concatenated


@dataclass(frozen=True)
class Batch:
    """Sequences of one model's data.

    Attributes:
        source: index of the model among the sources.
        weight: how much they count.
        tokens: int64 `[sequences, length]`.
        teacher: what leaves the last block of the model itself, `[sequences, length, hidden]`.
        sequences: of the batch in all processes, if others have some of it.
    """

    source: int
    weight: float
    tokens: Tensor
    teacher: Tensor
    sequences: int | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of the batch in all processes."""
        count, length = self.tokens.shape
        return length * (count if self.sequences is None else self.sequences)


@dataclass
class Objective:
    """The objective of one merge.

    Attributes:
        coordinates: the fitted tensors by name.
        shelf: keeps what enters each block between the forward and the backward sweep.
    """

    network: Network
    coordinates: Mapping[str, Coordinate]
    settings: RunParameters
    boundaries: BoundaryStates
    _merged: dict[int, Weights] = field(default_factory=dict)

    def __call__(self, point: MergeRecord, batches: Sequence[Batch]) -> tuple[float, Gradients]:
        """Loss in nats, and its gradient by the coefficients of every fitted tensor.

        Args:
            point: coefficients of every tensor of the model.

        Returns:
            The loss without penalties, and fp64 `[S, columns]` by name.
        """
        self._merged.clear()
        gradients: Gradients = {}

        def weights_of(number: int, opened: OpenStage) -> Weights:
            if number not in self._merged:
                merged = opened.merged_weights(point)
                if not self.network.keeps(number):
                    return merged
                self._merged[number] = merged
            return self._merged[number]

        tokens = [batch.tokens for batch in batches]
        hidden = forward(self.network, weights_of, tokens, self.boundaries)
        opened = self.network.output()
        loss, flowing = self._output(opened, point, batches, hidden, gradients)
        del opened
        for number, opened in self.network.backward():
            flowing = self._stage(
                opened, weights_of(number, opened), self.boundaries.get(number), flowing, gradients
            )
        first = {spec.name for spec in self.network.stages[0].tensors}
        if first & self.coordinates.keys():
            opened = self.network.open(0)
            self._stage(opened, weights_of(0, opened), tokens, flowing, gradients)
        self._merged.clear()
        return all_sums([loss])[0], {name: all_sum(own) for name, own in gradients.items()}

    def _output(
        self,
        opened: OpenStage,
        point: MergeRecord,
        batches: Sequence[Batch],
        hidden: Sequence[Tensor],
        gradients: Gradients,
    ) -> tuple[float, list[Tensor]]:
        """The loss, its gradient by what left the last block, and by the output's tensors."""
        weights = opened.merged_weights(point)
        sums = self._zeros(opened, weights)
        live = {n: w.detach().requires_grad_(n in sums) for n, w in weights.items()}
        device = self.network.device
        loss, flowing = 0.0, []
        for batch, stream in zip(batches, hidden, strict=True):
            teacher_part = opened.teacher_part(batch.source)
            teacher_weights = opened.teacher_weights(batch.source)
            entered = []
            for index in range(stream.shape[0]):  # logits of one sequence at a time
                x = stream[index : index + 1].to(device).requires_grad_(True)
                with torch.no_grad():
                    own = batch.teacher[index : index + 1].to(device)
                    wanted = teacher_part.run(teacher_weights, own)
                with torch.enable_grad():
                    part_loss = batch.weight * logit_loss(
                        opened.part.run(live, x)[0],
                        wanted[0],
                        self.settings,
                        total_tokens=batch.total_tokens,
                    )
                got = torch.autograd.grad(
                    part_loss, [x, *(live[n] for n in sums)], allow_unused=True
                )
                loss += float(part_loss.detach())
                entered.append(got[0].cpu())
                add_gradients(sums, got[1:])
            flowing.append(concatenated(entered, none=stream))
        self._turn(opened, sums, gradients)
        return loss, flowing

    def _stage(
        self,
        opened: OpenStage,
        weights: Weights,
        entered: Sequence[Tensor],
        flowing: Sequence[Tensor],
        gradients: Gradients,
    ) -> list[Tensor]:
        sums = self._zeros(opened, weights)
        flowing = [
            backward(opened.part, weights, x, gradient, self.network.device, sums=sums)
            for x, gradient in zip(entered, flowing, strict=True)
        ]
        self._turn(opened, sums, gradients)
        return flowing

    def _zeros(self, opened: OpenStage, weights: Weights) -> Gradients:
        return {
            name: torch.zeros_like(weights[name])
            for name, sources in opened.sources.items()
            if sources.name in self.coordinates
        }

    def _turn(self, opened: OpenStage, sums: Gradients, gradients: Gradients) -> None:
        """Add the gradients of a stage's weights to those of the coefficients.

        A tied tensor acts in two stages, and gets the sum of both.
        """
        for name, gradient in sums.items():
            sources = opened.sources[name]
            coordinate = self.coordinates[sources.name]
            turned = coefficient_gradient(
                sources.tensors,
                gradient,
                axis=coordinate.axis,
                per_column=coordinate.columns > 1,
            )
            gradients[sources.name] = gradients.get(sources.name, 0) + turned
