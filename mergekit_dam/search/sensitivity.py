"""Sensitivity of each domain's loss to the outputs of all linears, one stage in memory at a time.

1. A model at some coefficients has run forward, and the input of each block was saved.
2. The backward sweep saves the gradient at each block's output, which is as large as its input.
3. When a block is fitted, it runs once more on its saved input. Autograd, seeded by the saved
   gradient, gives the gradients at the outputs of its linears, and so their metrics.

The loss is `-log p(y)` of labels y drawn from the model's own distribution. The covariance of its
gradients is the Fisher information, which is the curvature of the KL.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergekit_dam.coefficients.merge import expert_axis, rows_of_expert
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.fitting.metric import Metric
from mergekit_dam.journal import Journal
from mergekit_dam.layers.expert_metrics import ExpertGradients
from mergekit_dam.layers.state import Metrics
from mergekit_dam.model.experts import Products, Routing
from mergekit_dam.model.hooks import Captured, capture
from mergekit_dam.model.units import Anatomy, Unit
from mergekit_dam.repeatable import in_one_order
from mergekit_dam.search.backprop import backward, chunks_of, not_finite
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams import progress
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.memory import memory_of
from mergekit_dam.streams.storage import may_stay
from mergekit_dam.streams.stream import Stream, concatenated

KINDS = ("linear", "router", "experts")
"""Kinds of units whose errors are measured in sensitivity metrics."""

GRADIENTS = "gradients"
"""What the journal knows of a backward sweep: the files of the gradients."""

TOKENS = 4096
"""Approximate number of tokens of a model's data whose gradients give its metrics."""


def measured_by(stream: Stream) -> Stream:
    """The sequences of a stream that give the metrics: the first ones of the fit."""
    fit = stream.of("fit")
    return fit.first(gradient_sequences(fit.share.count("fit"), fit.merged.shape[1]))


def gradient_sequences(count: int, length: int, *, tokens: int = TOKENS) -> int:
    """How many of a model's sequences metrics are made of: the first ones, and at least one.

    Args:
        count: sequences of the fit.
        length: tokens per sequence.
        tokens: about how many tokens are asked for.
    """
    return min(count, max(1, tokens // length))


def swept_back_once(
    network: Network,
    point: MergeRecord,
    streams: Sequence[Stream],
    entered: BoundaryStates,
    left: BoundaryStates,
    seed: int,
    journal: Journal,
) -> "Sensitivity":
    """`sweep_back`, or what it gave in an earlier run: the gradients are in files."""
    if journal.get(GRADIENTS) is not None:
        return Sensitivity(point, sources_of(streams), entered, left, network.device)
    found = sweep_back(network, point, streams, entered=entered, left=left, seed=seed)
    journal.put(GRADIENTS, left.files, said="the metrics' gradients were made")
    return found


def sweep_back(
    network: Network,
    point: MergeRecord,
    streams: Sequence[Stream],
    *,
    entered: BoundaryStates,
    left: BoundaryStates,
    seed: int,
) -> "Sensitivity":
    """Go backward through the model at some coefficients, saving gradients at blocks' outputs.

    Args:
        network: the stages of the model.
        point: the coefficients.
        streams: the streams of the sequences that give the metrics, after the last block.
        entered: inputs of each block, of the same sequences.
        left: saves the gradient at each block's output.
        seed: seed of the labels that are drawn.
    """
    progress.begin("backward")
    flowing = _label_gradients(network, point, streams, seed)
    for step, (number, opened) in enumerate(network.backward()):
        progress.show(f"backward {opened.part.label}", step=step)
        left.put(number, flowing)
        if number > 1:
            weights = opened.merged_weights(point)
            flowing = [
                backward(opened.part, weights, x, gradient, network.device, sums={})
                for x, gradient in zip(entered.get(number), flowing, strict=True)
            ]
    return Sensitivity(point, sources_of(streams), entered, left, network.device)


def sources_of(streams: Sequence[Stream]) -> tuple[int, ...]:
    """Indices of the streams' models."""
    return tuple(stream.source for stream in streams)


def _label_gradients(
    network: Network, point: MergeRecord, streams: Sequence[Stream], seed: int
) -> list[Tensor]:
    """Gradients of `-log p(y)`, summed over tokens that count, at the last block's outputs."""
    opened = network.output()
    weights = opened.merged_weights(point)
    device = network.device
    generator = torch.Generator(device)
    found = []
    for stream in streams:
        hidden, gradients = stream.merged[:], []
        for index, number in enumerate(stream.share.numbers):
            generator.manual_seed(_seed_of(seed, stream.source, number))
            # One sequence at a time: logits are large.
            x = hidden[index : index + 1].to(device).requires_grad_(True)
            tokens, weight = stream.counted_tokens(index)
            if not weight:
                gradients.append(torch.zeros_like(x).cpu())
                continue
            with torch.enable_grad():
                logits = opened.part.run(weights, x[:, tokens])[0].float()
                if not logits.isfinite().all():
                    raise not_finite(opened)
                labels = torch.multinomial(
                    logits.detach().softmax(-1), 1, generator=generator
                ).squeeze(1)
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                # Metrics are products of gradients, which a weight multiplies twice.
                loss = (weight * x.shape[1] / len(logits)) ** 0.5 * loss
            gradients.append(torch.autograd.grad(loss, x)[0].cpu())
        found.append(concatenated(gradients, none=hidden))
    return found


@dataclass(frozen=True)
class Sensitivity:
    """Metrics of all linears of a model at some coefficients.

    Attributes:
        point: the coefficients.
        sources: index of each stream's model.
        entered: inputs of each block, by stream.
        left: gradients at each block's output, by stream.
        device: device on which parts run.
    """

    point: MergeRecord
    sources: tuple[int, ...]
    entered: BoundaryStates
    left: BoundaryStates
    device: torch.device

    def metrics(self, number: int, opened: OpenStage, anatomy: Anatomy) -> Metrics:
        """Metrics of a block's linears, by source and unit; for experts, their gradients."""
        units = tuple(unit for unit in anatomy.units if unit.kind in KINDS)
        weights = opened.merged_weights(self.point)
        entered, left = self.entered.get(number), self.left.get(number)
        found: dict[tuple[int, str], Metric | ExpertGradients] = {}
        for source, x, gradient in zip(self.sources, entered, left, strict=True):
            rows, routing = self._output_gradients(opened, weights, units, x, gradient)
            own: dict[str, Metric] = {}
            for unit in units:
                gradients = rows.pop(unit.name)
                if unit.kind == "experts":
                    expert = partial(self._expert, opened, unit)
                    found[source, unit.name] = ExpertGradients(
                        routing[unit.name], gradients, expert
                    )
                else:
                    own[unit.name] = Metric.of_gradients(gradients)
            size = len(self.sources) * sum(metric.nbytes for metric in own.values())
            kept = self.device if may_stay(size, memory_of(self.device)) else torch.device("cpu")
            found |= {(source, name): metric.to(kept) for name, metric in own.items()}
        return found

    def _expert(self, opened: OpenStage, unit: Unit, expert: int) -> dict[str, Tensor]:
        """Weights of one expert at the point, by parameter, fp32."""
        found = {}
        for parameter in unit.parameters:
            sources = opened.sources[unit.parameter(parameter)]
            axis = self.point.axes.get(sources.name, -1)
            own = sources.of_expert(expert).on(self.device)
            rows = rows_of_expert(
                self.point.coefficients[sources.name], sources.tensors[0].shape, axis, expert
            )
            found[parameter] = own.merged(rows, axis=expert_axis(axis)).float()
        return found

    def _output_gradients(
        self,
        opened: OpenStage,
        weights: dict[str, Tensor],
        units: tuple[Unit, ...],
        x: Tensor,
        gradient: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Routing]]:
        """Gradients at units' outputs, each fp32 `[tokens, out]`, and the experts' routing."""
        device = self.device
        width = opened.stage.models.output.config.get_text_config().hidden_size
        names = tuple(unit.name for unit in units if unit.kind != "router")
        routers = {u.name: weights[u.parameter("weight")] for u in units if u.kind == "router"}
        experts = tuple(unit.name for unit in units if unit.kind == "experts")
        found: dict[str, list[Tensor]] = {name: [] for name in (*names, *routers)}
        fed: dict[str, list[Routing]] = {name: [] for name in experts}

        def through(chunk: slice) -> tuple[list[Tensor], Captured]:
            with (
                torch.enable_grad(),
                capture(opened.part.root, inputs=experts, stop=False) as captured,
                Products(routers) as logits,
            ):
                inner = x[chunk].to(device).requires_grad_(True)
                leaving, seen = opened.part.watched(weights, inner, outputs=names)
            seen |= {name: product.output for name, product in logits.seen.items()}
            outputs = [seen[name] for name in found]
            got = torch.autograd.grad(
                leaving, outputs, gradient[chunk].to(device), allow_unused=True
            )
            pairs = zip(outputs, got, strict=True)
            return [torch.zeros_like(at) if own is None else own for at, own in pairs], captured

        for chunk in chunks_of(x):
            got, captured = in_one_order(through, chunk)
            for name, rows in zip(found, got, strict=True):
                found[name].append(rows.float().reshape(-1, rows.shape[-1]))
            for name in experts:
                fed[name].append(Routing(*(tensor.detach() for tensor in captured.routing[name])))
        return (
            {
                unit.name: concatenated(found[unit.name], none=_no_rows(unit, weights, width))
                for unit in units
            },
            {
                name: Routing.joined(routings or [_nobody(x, width)])
                for name, routings in fed.items()
            },
        )


def _seed_of(seed: int, source: int, number: int) -> int:
    """Seed of one sequence's labels: the same in whichever process draws them."""
    return random.Random(f"{seed} {source} {number}").getrandbits(63)


def _no_rows(unit: Unit, weights: dict[str, Tensor], width: int) -> Tensor:
    """Empty gradients `[0, out]` at the output of a linear or of experts.

    Args:
        width: size of the hidden states.
    """
    weight = weights[unit.parameter(unit.parameters[0])]
    if unit.kind == "experts":
        return weight.new_empty(0, width)
    return weight.new_empty(0, weight.shape[1 if unit.axis == 0 else 0])


def _nobody(x: Tensor, width: int) -> Routing:
    """The routing of no tokens, whose hidden states would have a width."""
    none = x.new_empty(0, 1, dtype=torch.float32)
    return Routing(none.new_empty(0, width), none.long(), none)
