"""Loss and gradient of the end-to-end objective, one stage in memory at a time.

The objective is `sum_k w_k loss_k`. `loss_k` compares the merged model's logits on model k's data
with model k's own logits. Each step reads every source's weights twice, once forward and once
backward. Only the gradients of the coefficients are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dam.coefficients.correction import out_by_in
from mergekit_dam.coefficients.merge import coefficient_gradient
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.backprop import Gradients, Weights, add_gradients, backward, forward
from mergekit_dam.search.coordinates import Coordinate
from mergekit_dam.search.factors import Factors
from mergekit_dam.search.losses import logit_loss
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.counting import counted_tokens
from mergekit_dam.streams.distributed import all_sum, all_sums
from mergekit_dam.streams.stream import concatenated


@dataclass(frozen=True)
class Batch:
    """Sequences of one model's data.

    Attributes:
        source: index of the model among the sources.
        weight: weight of their loss.
        tokens: int64 `[sequences, length]`.
        teacher: hidden states that leave the model's own last block, `[sequences, length, hidden]`.
        sequences: number of sequences of the batch in all processes; None if all are in this one.
        weights: weight of every token, `[sequences, length]`; None if all count alike.
    """

    source: int
    weight: float
    tokens: Tensor
    teacher: Tensor
    sequences: int | None = None
    weights: Tensor | None = None

    @property
    def total_tokens(self) -> int:
        """Number of tokens of the batch in all processes."""
        count, length = self.tokens.shape
        return length * (count if self.sequences is None else self.sequences)


@dataclass
class Objective:
    """The objective of one merge.

    Attributes:
        network: the stages of the model.
        coordinates: the fitted tensors by name.
        settings: parameters of the merge.
        boundaries: keeps the input of each block between the forward and the backward sweep.
    """

    network: Network
    coordinates: Mapping[str, Coordinate]
    settings: RunParameters
    boundaries: BoundaryStates
    _merged: dict[int, Weights] = field(default_factory=dict)

    def __call__(
        self, point: MergeRecord, batches: Sequence[Batch], factors: Factors | None = None
    ) -> tuple[float, Gradients]:
        """Loss in nats, and its gradient with respect to the fitted tensors' coefficients.

        Args:
            point: coefficients of every tensor of the model.
            batches: one batch per model.
            factors: the factors of the point's corrections, if they move: their gradients are
                added to, in this process, by the share of one batch in a step.

        Returns:
            The loss without penalties, and the gradients fp64 `[S, columns]` by tensor name.
        """
        self._merged.clear()
        found = _Found(self.coordinates, factors, 1 / self.settings.gradient_accumulation)

        def weights_of(number: int, opened: OpenStage) -> Weights:
            if number not in self._merged:
                merged = opened.merged_weights(point)
                if not self.network.keeps_on_device(number):
                    return merged
                self._merged[number] = merged
            return self._merged[number]

        tokens = [batch.tokens for batch in batches]
        hidden = forward(self.network, weights_of, tokens, self.boundaries)
        opened = self.network.output()
        loss, flowing = self._output(opened, point, batches, hidden, found)
        del opened
        for number, opened in self.network.backward():
            flowing = self._stage(
                opened, weights_of(number, opened), self.boundaries.get(number), flowing, found
            )
        first = {spec.name for spec in self.network.stages[0].tensors}
        if first & self.coordinates.keys():
            opened = self.network.open(0)
            self._stage(opened, weights_of(0, opened), tokens, flowing, found)
        self._merged.clear()
        return all_sums([loss])[0], {name: all_sum(own) for name, own in found.gradients.items()}

    def _output(
        self,
        opened: OpenStage,
        point: MergeRecord,
        batches: Sequence[Batch],
        hidden: Sequence[Tensor],
        found: "_Found",
    ) -> tuple[float, list[Tensor]]:
        """The loss and its gradients at the last block's outputs; `found` gets the stage's."""
        weights = opened.merged_weights(point)
        sums = self._zeros(opened, weights)
        live = {n: w.detach().requires_grad_(n in sums) for n, w in weights.items()}
        device = self.network.device
        loss, flowing = 0.0, []
        for batch, stream in zip(batches, hidden, strict=True):
            teacher_part = opened.teacher_part(batch.source)
            teacher_weights = opened.teacher_weights(batch.source)
            entered = []
            for index in range(stream.shape[0]):  # one sequence at a time: logits are large
                x = stream[index : index + 1].to(device).requires_grad_(True)
                tokens, weight = counted_tokens(batch.weights, index)
                if not weight:
                    entered.append(torch.zeros_like(x).cpu())
                    continue
                with torch.no_grad():
                    own = batch.teacher[index : index + 1][:, tokens].to(device)
                    wanted = teacher_part.run(teacher_weights, own)[0]
                with torch.enable_grad():
                    part_loss = (batch.weight * weight) * logit_loss(
                        opened.part.run(live, x[:, tokens])[0],
                        wanted,
                        self.settings,
                        total_tokens=batch.total_tokens * len(wanted) // x.shape[1],
                    )
                got = torch.autograd.grad(
                    part_loss, [x, *(live[n] for n in sums)], allow_unused=True
                )
                loss += float(part_loss.detach())
                entered.append(got[0].cpu())
                add_gradients(sums, got[1:])
            flowing.append(concatenated(entered, none=stream))
        found.turn(opened, sums)
        return loss, flowing

    def _stage(
        self,
        opened: OpenStage,
        weights: Weights,
        entered: Sequence[Tensor],
        flowing: Sequence[Tensor],
        found: "_Found",
    ) -> list[Tensor]:
        sums = self._zeros(opened, weights)
        flowing = [
            backward(opened.part, weights, x, gradient, self.network.device, sums=sums)
            for x, gradient in zip(entered, flowing, strict=True)
        ]
        found.turn(opened, sums)
        return flowing

    def _zeros(self, opened: OpenStage, weights: Weights) -> Gradients:
        return {
            name: torch.zeros_like(weights[name])
            for name, sources in opened.sources.items()
            if sources.name in self.coordinates
        }


@dataclass
class _Found:
    """What becomes of the gradients of merged weights, which are not kept themselves.

    Attributes:
        coordinates: the fitted tensors by name.
        factors: the factors that move; they keep their own gradients.
        share: share of a batch in a step, for the factors.
        gradients: gradients of coefficients, by tensor name.
    """

    coordinates: Mapping[str, Coordinate]
    factors: Factors | None
    share: float
    gradients: Gradients = field(default_factory=dict)

    def turn(self, opened: OpenStage, sums: Gradients) -> None:
        """Convert the gradients of a stage's weights to those of the unknowns, and add them.

        A tied tensor acts in two stages; its gradient is the sum of both.
        """
        for name, gradient in sums.items():
            sources = opened.sources[name]
            coordinate = self.coordinates[sources.name]
            turned = coefficient_gradient(
                sources.on(gradient.device).tensors,
                gradient,
                axis=coordinate.axis,
                per_column=coordinate.columns > 1,
            )
            self.gradients[sources.name] = self.gradients.get(sources.name, 0) + turned
            if self.factors is not None and coordinate.rank:
                facing = out_by_in(gradient, coordinate.axis)
                self.factors.add_gradient(sources.name, facing, self.share)
