"""How much each domain's loss feels the outputs of every linear, one stage in memory at a time.

1. A model at some coefficients has run forward, and what entered each block was kept.
2. Backward, keeping the gradient of what leaves each block: as large as what enters it.
3. When a block is fitted, it is run once more on what entered it, with autograd seeded by that
   gradient, which gives the gradients at the outputs of its linears, and so their metrics.

The loss is `-log p(y)` of labels y drawn from the model's own distribution: the covariance of its
gradients is the Fisher information, which is the curvature of the KL.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.anatomy import Anatomy
from mergekit_dam.backprop import Shelf, backward, chunks_of
from mergekit_dam.fitting.metric import Metric
from mergekit_dam.fitting.state import Metrics
from mergekit_dam.network import Network, OpenStage
from mergekit_dam.objective.descend import Data
from mergekit_dam.stage import Record

TOKENS = 4096
"""Tokens of a model's data whose gradients make up its metrics, about."""


class Sensitivity:
    """Metrics of all linears of a model at some coefficients.

    Args:
        point: the coefficients.
        hidden: what leaves the model's last block, `[sequences, length, hidden]` a stream.
        entered: what enters each block.
        left: keeps the gradient of what leaves each block.
        seed: of the labels that are drawn.
    """

    def __init__(
        self,
        network: Network,
        point: Record,
        data: Sequence[Data],
        hidden: Sequence[Tensor],
        *,
        entered: Shelf,
        left: Shelf,
        seed: int,
    ) -> None:
        self._network, self._point = network, point
        self._entered, self._left = entered, left
        self._sources = [own.source for own in data]
        self._counts = [_enough(own.of("fit").tokens) for own in data]
        self._sweep(hidden, seed)

    def _chosen(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """The sequences whose gradients are taken."""
        return [x[:count] for x, count in zip(streams, self._counts, strict=True)]

    def _sweep(self, hidden: Sequence[Tensor], seed: int) -> None:
        """Backward over the sequences of the fit."""
        network = self._network
        flowing = self._label_gradients(self._chosen(hidden), seed)
        for number, opened in network.backward():
            self._left.put(number, flowing)
            if number > 1:
                weights = opened.merged_weights(self._point)
                entered = self._chosen(self._entered.get(number))
                flowing = [
                    backward(opened.part, weights, x, gradient, network.device, sums={})
                    for x, gradient in zip(entered, flowing, strict=True)
                ]

    def _label_gradients(self, hidden: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Gradients of what left the last block, of `-log p(y)` summed over the tokens."""
        opened = self._network.output()
        weights = opened.merged_weights(self._point)
        device = self._network.device
        generator = torch.Generator(device).manual_seed(seed)
        found = []
        for stream in hidden:
            gradients = []
            for index in range(stream.shape[0]):  # logits of one sequence at a time
                x = stream[index : index + 1].to(device).requires_grad_(True)
                with torch.enable_grad():
                    logits = opened.part.run(weights, x)[0].float()
                    labels = torch.multinomial(
                        logits.detach().softmax(-1), 1, generator=generator
                    ).squeeze(1)
                    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                gradients.append(torch.autograd.grad(loss, x)[0].cpu())
            found.append(torch.cat(gradients))
        return found

    def metrics(self, number: int, opened: OpenStage, anatomy: Anatomy) -> Metrics:
        """The metrics of a block's linears, by source and unit."""
        units = tuple(unit.name for unit in anatomy.units if unit.kind == "linear")
        weights = opened.merged_weights(self._point)
        entered = self._chosen(self._entered.get(number))
        streams = zip(self._sources, entered, self._left.get(number), strict=True)
        return {
            (source, name): Metric.of_gradients(rows)
            for source, x, gradient in streams
            for name, rows in self._output_gradients(opened, weights, units, x, gradient).items()
        }

    def _output_gradients(
        self,
        opened: OpenStage,
        weights: dict[str, Tensor],
        units: tuple[str, ...],
        x: Tensor,
        gradient: Tensor,
    ) -> dict[str, Tensor]:
        """Gradients at the outputs of linears, fp32 `[tokens, out]` each."""
        device = self._network.device
        found: dict[str, list[Tensor]] = {unit: [] for unit in units}
        for chunk in chunks_of(x):
            with torch.enable_grad():
                inner = x[chunk].to(device).requires_grad_(True)
                leaving, seen = opened.part.watched(weights, inner, outputs=units)
            outputs = [seen[unit] for unit in units]
            got = torch.autograd.grad(
                leaving, outputs, gradient[chunk].to(device), allow_unused=True
            )
            for unit, output, own in zip(units, outputs, got, strict=True):
                rows = torch.zeros_like(output) if own is None else own
                found[unit].append(rows.reshape(-1, rows.shape[-1]))
        return {unit: torch.cat(rows) for unit, rows in found.items()}


def _enough(tokens: Tensor) -> int:
    """How many of the sequences `[sequences, length]` hold about `TOKENS` tokens."""
    return min(len(tokens), max(1, TOKENS // tokens.shape[1]))
