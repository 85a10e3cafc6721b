"""Back-propagation through a model with one stage in memory at a time.

1. Forward, stage by stage. The input of each block is saved as a boundary state.
2. At the output, the caller computes the gradient at the last block's output.
3. Backward, stage by stage in reverse order. Each stage runs again on its saved input, and turns
   the gradient at its output into the gradients at its input and of its weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.errors import DamError
from mergekit_dam.model.part import Part
from mergekit_dam.repeatable import in_one_order
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
    """Run the merged model up to the output of its last block.

    Args:
        network: the stages of the model.
        weights_of: returns the weights of a stage, fp32, by names relative to the part.
        tokens: int64 `[sequences, length]` per stream.
        boundaries: saves the input of each block.

    Returns:
        Hidden states fp32 `[sequences, length, hidden]` per stream, on the host.
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
    """Run a part on a whole stream; yields its output, chunk by chunk."""
    return (part.run(weights, x[chunk].to(device)) for chunk in chunks_of(x))


def chunks_of(x: Sequences) -> Iterator[slice]:
    """Slices of `[sequences, length, ...]`, each run through a part at once."""
    return chunks(0, x.shape[0], x.shape[1])


def add_gradients(sums: Gradients, gradients: Iterable[Tensor | None]) -> None:
    """Add gradients in the order of the sums; None where the loss does not depend on a weight."""
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
    """Turn the gradient at a part's output into the gradient at its input.

    Args:
        part: the part.
        weights: its weights, by relative name.
        x: its input, `[sequences, length, ...]`.
        gradient: gradient at its output, `[sequences, length, hidden]`.
        device: device on which the part runs.
        sums: gradients of weights by name, fp32. The gradients of exactly these weights are
            computed and added in place.

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
        wanted = [*([inner] if inner.is_floating_point() else []), *(live[n] for n in sums)]
        got = in_one_order(_through, part, live, inner, gradient[chunk].to(device), wanted)
        if inner.is_floating_point():
            entered.append(got[0].cpu())
            got = got[1:]
        add_gradients(sums, got)
    return concatenated(entered, none=x.new_empty(0))


def _through(
    part: Part,
    weights: Mapping[str, Tensor],
    x: Tensor,
    gradient: Tensor,
    wanted: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Run a chunk through a part and back."""
    with torch.enable_grad():
        left = part.run(weights, x)
    return torch.autograd.grad(left, wanted, gradient, allow_unused=True)


def not_finite(opened: OpenStage) -> DamError:
    """The error that a part puts out what is not finite."""
    return DamError(
        f"{opened.part.label}: its output is not finite, because a model's weights, or its hidden "
        f"states on its calibration text, are not"
    )
