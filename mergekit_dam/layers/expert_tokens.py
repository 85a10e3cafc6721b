"""Calibration data at the input of a block's experts, and the tokens of a single expert.

The merged model's own router decides, on the merged stream, which expert sees which token. The
teacher's experts see the same token as it stands in the teacher's own stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.choices import ExpertFeed
from mergekit_dam.layers.seen import see
from mergekit_dam.layers.state import Walk
from mergekit_dam.layers.targets import token_weights
from mergekit_dam.model.experts import Routing
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.distributed import all_sum, all_sums
from mergekit_dam.streams.share import SPLITS, Split
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream


@dataclass(frozen=True)
class ExpertTokens:
    """Some tokens of one expert.

    Attributes:
        teacher, merged: inputs of the expert in the teacher and in the merged model,
            `[tokens, hidden]`.
        weight: weight of each token's errors, `[tokens]`.
    """

    teacher: Tensor
    merged: Tensor
    weight: Tensor


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over the tokens of a split, in all processes.

    Attributes:
        energy: weighted sum of the squared norms of the teacher's experts' summed output.
        count: sum of the tokens' weights.
        sent: number of tokens that count and are routed to each expert, int64 `[experts]`.
    """

    energy: float
    count: float
    sent: Tensor


@dataclass(frozen=True)
class RoutedStream:
    """One stream at the input of a block's experts.

    Attributes:
        stream: the stream itself.
        entering: inputs of the teacher's experts and of the merged ones, side by side:
            `[sequences, length, 2 * hidden]`, stored where the stream is stored.
        experts, weights: the routing, `[tokens, k]`, on the host.
        counted: weight of each token, `[tokens]`, on the host.
        sums: totals of each split.
    """

    stream: Stream
    entering: Sequences
    experts: Tensor
    weights: Tensor
    counted: Tensor
    sums: dict[Split, RoutingTotals]

    def sent(
        self, expert: int, split: Split, fed: ExpertFeed, device: torch.device
    ) -> Iterator[ExpertTokens]:
        """The tokens of an expert in a split that count, chunk by chunk.

        An expert adds `g f(x)` to the summed output of all experts, so errors count with the
        square of g. If every token feeds the expert, g is ignored.
        """
        length = self.stream.teacher.shape[1]
        for chunk in self.stream.chunks(split):
            tokens = slice(chunk.start * length, chunk.stop * length)
            here = self.experts[tokens] == expert
            counts = self.counted[tokens] > 0
            rows = (counts & here.any(1) if fed == "routed" else counts).nonzero()[:, 0]
            if not len(rows):
                continue
            entering = self.entering[chunk].reshape(len(here), -1)[rows].to(device)
            teacher, merged = entering.chunk(2, dim=1)
            weight = self.counted[tokens][rows]
            if fed == "routed":
                weight = weight * (self.weights[tokens] * here).sum(1)[rows].square()
            yield ExpertTokens(teacher, merged, weight.to(device))


def observe(walk: Walk, group: int, unit: Unit, stream: Stream) -> RoutedStream:
    """Run both parts up to the experts of a group and keep the inputs of the experts."""
    count = walk.weight(unit).tensors[0].shape[0]
    routings: list[Routing] = []
    weighted: list[Tensor] = []
    energies: list[Tensor] = []

    def entering() -> Iterator[Tensor]:
        for seen in see(walk, group, [unit], stream, None):
            routing, output = seen.merged.routing[unit.name], seen.teacher.outputs[unit.name]
            weighted.append(token_weights([output], seen.sequences, seen.counted).cpu())
            energies.append(output.square().sum(-1, dtype=torch.float64).reshape(-1).cpu())
            routings.append(Routing(torch.empty(0), routing.experts.cpu(), routing.weights.cpu()))
            rows = torch.cat([seen.teacher.inputs[unit.name], routing.hidden], dim=1)
            yield rows.reshape(seen.sequences, -1, rows.shape[1])

    kept = stream.keep(entering())
    if not routings:  # this process has no sequence
        routings.append(Routing(torch.empty(0), torch.empty(0, 1).long(), torch.empty(0, 1)))
    experts = torch.cat([routing.experts for routing in routings])
    weights = torch.cat([routing.weights for routing in routings])
    counted, energy = torch.cat([*weighted, torch.empty(0)]), torch.cat([*energies, torch.empty(0)])
    length = stream.teacher.shape[1]
    sums: dict[Split, RoutingTotals] = {}
    for split in SPLITS:
        first, last = (length * border for border in stream.share.rows(split))
        own = counted[first:last].double()
        weighted_energy, weight = all_sums(
            [float(own @ energy[first:last].double()), float(own.sum())]
        )
        sent = torch.bincount(experts[first:last][own > 0].reshape(-1), minlength=count)
        sums[split] = RoutingTotals(weighted_energy, weight, all_sum(sent))
    return RoutedStream(stream, kept, experts, weights, counted, sums)
