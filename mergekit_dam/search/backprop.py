"""Back-propagation through a model of which one stage is in memory at a time.

1. Forward, stage by stage; what enters each block goes to a shelf.
2. At the output, whoever calls seeds the gradient of what left the last block.
3. Backward, stage by stage in reverse: run the stage again on what entered it, and turn the
   gradient of what leaves it into that of what enters it, and of its weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.model.part import Part
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import chunks, concatenated

Weights = dict[str, Tensor]
WeightsOf = Callable[[int, OpenStage], Weights]
Gradients = dict[str, Tensor]


@torch.no_grad()
def forward(
    network: Network,
    weights_of: WeightsOf,
    tokens: Sequence[Tensor],
    boundaries: BoundaryStates | None = None,
) -> list[Tensor]:
    """Run the merged model up to what leaves its last block.

    Args:
        weights_of: weights of a stage, fp32, by names relative to the part.
        tokens: int64 `[sequences, length]` a stream.
        shelf: keeps what enters each block.

    Returns:
        Hidden states fp32 `[sequences, length, hidden]` a stream, on the host.
    """
    streams = list(tokens)
    for number, opened in network.forward():
        if boundaries is not None and number > 0:
            boundaries.put(number, streams)
        weights = weights_of(number, opened)
        left = [run(opened.part, weights, stream, network.device) for stream in streams]
        streams = [
            concatenated([chunk.cpu() for chunk in leaving], none=stream)
            for leaving, stream in zip(left, streams, strict=True)
        ]
    return streams


def run(
    part: Part, weights: Mapping[str, Tensor], x: Sequences, device: torch.device
) -> Iterator[Tensor]:
    """Run a part on a whole stream: what leaves it, chunk by chunk."""
    return (part.run(weights, x[chunk].to(device)) for chunk in chunks_of(x))


def chunks_of(x: Sequences) -> Iterator[slice]:
    """Slices of `[sequences, length, ...]` that run through a part at a time."""
    return chunks(0, x.shape[0], x.shape[1])


def add_gradients(sums: Gradients, gradients: Iterable[Tensor | None]) -> None:
    """Add gradients in the order of the sums; None for what the loss does not depend on."""
    for total, gradient in zip(sums.values(), gradients, strict=True):
        if gradient is not None:
            total += gradient


def backward(
    part: Part,
    weights: Mapping[str, Tensor],
    x: Tensor,
    gradient: Tensor,
    device: torch.device,
    *,
    sums: Gradients,
) -> Tensor:
    """Turn the gradient of what leaves a part into that of what enters it.

    Args:
        x: what entered, `[sequences, length, ...]`.
        gradient: of what left, `[sequences, length, hidden]`.
        sums: gradients of weights by name, fp32, to add to; those named in it are computed.

    Returns:
        Gradient of x, on the host; empty for token ids.
    """
    entered = []
    if not sums and not x.is_floating_point():
        return x.new_empty(0)
    for chunk in chunks_of(x):
        inner = x[chunk].to(device)
        live = {n: w.detach().requires_grad_(n in sums) for n, w in weights.items()}
        if inner.is_floating_point():
            inner = inner.detach().requires_grad_(True)
        with torch.enable_grad():
            left = part.run(live, inner)
        wanted = [*([inner] if inner.is_floating_point() else []), *(live[n] for n in sums)]
        got = torch.autograd.grad(left, wanted, gradient[chunk].to(device), allow_unused=True)
        if inner.is_floating_point():
            entered.append(got[0].cpu())
            got = got[1:]
        add_gradients(sums, got)
    return concatenated(entered, none=x.new_empty(0))
