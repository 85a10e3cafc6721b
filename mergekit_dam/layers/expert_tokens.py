"""Calibration data where it enters the experts of a block, and the tokens of one of them.

Who is sent where is the merged model's own routing of the merged stream. The teacher's experts
see the same token as it is in the teacher's own stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.layers.seen import see
from mergekit_dam.layers.state import Walk
from mergekit_dam.layers.targets import token_weights
from mergekit_dam.model.experts import Routing
from mergekit_dam.model.units import Unit
from mergekit_dam.parameters import ExpertFeed
from mergekit_dam.streams.distributed import all_sum, all_sums
from mergekit_dam.streams.share import SPLITS, Split
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream


@dataclass(frozen=True)
class ExpertTokens:
    """Some tokens of one expert.

    Attributes:
        teacher, merged: what enters it in the teacher and in the merged model, `[tokens, hidden]`.
        weight: how much its errors count, `[tokens]`.
    """

    teacher: Tensor
    merged: Tensor
    weight: Tensor


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over the tokens of a split, in all processes.

    Attributes:
        energy: of what the teacher's experts put out together.
        count: of the tokens' weights.
        sent: tokens that are sent to each expert, int64 `[experts]`.
    """

    energy: float
    count: float
    sent: Tensor


@dataclass(frozen=True)
class RoutedStream:
    """One stream where it enters the experts of a block.

    Attributes:
        entering: what enters the teacher's experts and the merged ones, side by side:
            `[sequences, length, 2 * hidden]`, where the stream is kept.
        experts, weights: the routing, `[tokens, k]`, on the host.
        counted: how much each token counts, `[tokens]`, on the host.
        sums: by split.
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
        """The tokens of an expert in a split, chunk by chunk.

        What it makes of a token counts for `g f(x)` in what leaves all experts, so that errors
        count with the square of g; where every token feeds it, without regard to g.
        """
        length = self.stream.teacher.shape[1]
        for chunk in self.stream.chunks(split):
            tokens = slice(chunk.start * length, chunk.stop * length)
            here = self.experts[tokens] == expert
            rows = here.any(1).nonzero()[:, 0] if fed == "routed" else torch.arange(len(here))
            if not len(rows):
                continue
            entering = self.entering[chunk].reshape(len(here), -1)[rows].to(device)
            teacher, merged = entering.chunk(2, dim=1)
            weight = self.counted[tokens][rows]
            if fed == "routed":
                weight = weight * (self.weights[tokens] * here).sum(1)[rows].square()
            yield ExpertTokens(teacher, merged, weight.to(device))


def observe(walk: Walk, group: int, unit: Unit, stream: Stream) -> RoutedStream:
    """Run both parts up to the experts of a stage."""
    count = walk.weight(unit).tensors[0].shape[0]
    routings: list[Routing] = []
    weighted: list[Tensor] = []
    energies: list[Tensor] = []

    def entering() -> Iterator[Tensor]:
        for seen in see(walk, group, [unit], stream, None):
            routing, output = seen.merged.routing[unit.name], seen.teacher.outputs[unit.name]
            weighted.append(token_weights([output], seen.sequences).cpu())
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
        gradients, weight = all_sums([float(own @ energy[first:last].double()), float(own.sum())])
        sent = torch.bincount(experts[first:last].reshape(-1), minlength=count)
        sums[split] = RoutingTotals(gradients, weight, all_sum(sent))
    return RoutedStream(stream, kept, experts, weights, counted, sums)
