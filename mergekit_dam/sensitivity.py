"""How much each domain's loss feels the outputs of every linear, one stage in memory at a time.

1. A model at some coefficients has run forward, and what entered each block was kept.
2. Backward, keeping the gradient of what leaves each block: as large as what enters it.
3. When a block is fitted, it is run once more on what entered it, with autograd seeded by that
   gradient, which gives the gradients at the outputs of its linears, and so their metrics.

The loss is `-log p(y)` of labels y drawn from the model's own distribution: the covariance of its
gradients is the Fisher information, which is the curvature of the KL.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergekit_dam.anatomy import Anatomy
from mergekit_dam.backprop import Shelf, backward, chunks_of
from mergekit_dam.fitting.metric import Metric
from mergekit_dam.fitting.state import Metrics
from mergekit_dam.fitting.streams import Stream
from mergekit_dam.network import Network, OpenStage
from mergekit_dam.stage import Record

TOKENS = 4096
"""Tokens of a model's data whose gradients make up its metrics, about."""


def felt_tokens(stream: Stream) -> Tensor:
    """The merged stream's sequences that metrics are made of: some of those of the fit."""
    _, last = stream.border("fit")
    return stream.merged[: min(last, max(1, TOKENS // stream.merged.shape[1]))]


class Sensitivity:
    """Metrics of all linears of a model at some coefficients.

    Args:
        point: the coefficients.
        streams: at the end of the last block.
        entered: `felt_tokens` of what enters each block.
        left: keeps the gradient of what leaves each block.
        seed: of the labels that are drawn.
        show: shows a line of progress.
    """

    def __init__(
        self,
        network: Network,
        point: Record,
        streams: Sequence[Stream],
        *,
        entered: Shelf,
        left: Shelf,
        seed: int,
        show: Callable[[str], None],
    ) -> None:
        self._network, self._point = network, point
        self._entered, self._left = entered, left
        self._sources = [stream.source for stream in streams]
        flowing = self._label_gradients([felt_tokens(stream) for stream in streams], seed)
        for number, opened in network.backward():
            show(f"backward {opened.part.label}")
            self._left.put(number, flowing)
            if number > 1:
                weights = opened.merged_weights(point)
                flowing = [
                    backward(opened.part, weights, x, gradient, network.device, sums={})
                    for x, gradient in zip(entered.get(number), flowing, strict=True)
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
        entered, left = self._entered.get(number), self._left.get(number)
        streams = zip(self._sources, entered, left, strict=True)
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
