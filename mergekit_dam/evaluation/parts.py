"""Losses of a model that runs part after part: one block at a time is in memory.

All sequences go through a part before the next one is read, so that every weight is read once. What
they leave is kept in memory; where that would be too much, they go in several groups.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.evaluation.sources import Judged, stored_dtype
from mergekit_dam.evaluation.texts import Sequences
from mergekit_dam.evaluation.whole import position_losses
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.part import Part, block_part, input_part, output_part
from mergekit_dam.model.probe import hidden_size, input_or_output, make_decoder

HIDDEN_STATES = 2**30
"""Most bytes of hidden states in memory."""

LOGITS = 2**24
"""Most elements of logits at once: 64 MiB in fp32."""

Done = Callable[[int], None]
"""Told of every batch that went through a part: parameters of the part times sequences."""


@dataclass(frozen=True)
class PartedModel:
    """A model that can run in parts.

    Attributes:
        judged: The model.
        decoder: Its module tree without weights.
        parts: Input, blocks, output.
        weights: For each part, names of its weights relative to the part -> names in the model.
        dtype: Dtype of weights and products.
        width: Width of the residual stream.
        sizes: Elements of every weight by its name in the model.
    """

    judged: Judged
    decoder: Decoder
    parts: tuple[Part, ...]
    weights: tuple[Mapping[str, str], ...]
    dtype: torch.dtype
    width: int
    sizes: Mapping[str, int]

    @property
    def whole_cost(self) -> int:
        """Parameters that the model multiplies each token by."""
        return sum(map(self.cost, range(len(self.parts))))

    def cost(self, number: int) -> int:
        """Parameters that a part multiplies each token by; the input looks up rows."""
        return 0 if number == 0 else sum(self.sizes[name] for name in self.weights[number].values())


def in_parts(judged: Judged, settings: EvaluationSettings) -> PartedModel:
    """Prepare a model to run in parts; its weights are checked by name, and not read.

    Raises:
        ArchitectureError: It cannot run in parts.
        DamError: Weights are missing.
    """
    config = judged.source.config(judged.trust_remote_code)
    device = torch.device(settings.device)
    decoder = make_decoder(config, device, trust_remote_code=judged.trust_remote_code)
    names = decoder.names
    dtype = stored_dtype(judged) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    count = len(decoder.blocks)
    blocks = [block_part(decoder, index, dtype) for index in range(count)]
    parts = (input_part(decoder), *blocks, replace(output_part(decoder), dtype=dtype))
    first = dict.fromkeys(names.first.values())
    outside = [name for name in first if names.block_of(name) is None]
    place = input_or_output(decoder, frozenset(outside))
    own: list[dict[str, str]] = [{name: name for name in place if place[name] == "input"}]
    for index, part in enumerate(blocks):
        inside = [name for name in names.first if names.block_of(name) == index]
        own.append({name[len(part.prefix) :]: names.first[name] for name in inside})
    own.append({name: name for name in place if place[name] == "output"} | _tied_head(decoder))
    parameters = {name for name, _ in decoder.model.named_parameters()}
    needed = [name for part in own for name in part.values() if name in parameters]
    judged.check(names, dict.fromkeys(needed))
    sizes = {n: w.numel() for n, w in decoder.model.state_dict(keep_vars=True).items()}
    return PartedModel(judged, decoder, parts, tuple(own), dtype, hidden_size(decoder), sizes)


def _tied_head(decoder: Decoder) -> dict[str, str]:
    """The embedding, where the head is tied to it."""
    names, head = decoder.names, f"{decoder.head_name}.weight"
    first = names.first.get(head, head)
    return {} if first == head or first not in names.first else {first: first}


@torch.inference_mode()
def losses_in_parts(
    model: PartedModel, text: Sequences, settings: EvaluationSettings, done: Done
) -> Tensor:
    """The mean loss of every sequence over the tokens that count, in nats per token.

    Args:
        done: Called after every batch.

    Returns:
        fp64 `[sequences]` on the CPU.

    Raises:
        CheckpointError: A weight is not finite.
    """
    bytes_each = text.tokens.shape[1] * model.width * torch.float32.itemsize
    group = max(1, HIDDEN_STATES // bytes_each)
    groups = zip(torch.split(text.tokens, group), torch.split(text.counted, group), strict=True)
    return torch.cat([_of_group(model, Sequences(*own), settings, done) for own in groups])


def _of_group(
    model: PartedModel, text: Sequences, settings: EvaluationSettings, done: Done
) -> Tensor:
    tokens = text.tokens.to(settings.device)
    hidden = tokens  # what enters the next part
    rows = settings.batch_size
    for number in range(len(model.parts) - 1):
        part, weights = model.parts[number], _read(model, number, settings.device)
        leaving = hidden  # it may be overwritten, as a batch leaves where it entered
        if number == 0:
            leaving = torch.empty(*tokens.shape, model.width, device=settings.device)
        for first, batch in _batches(hidden, rows):
            leaving[first : first + len(batch)] = part.run(weights, batch)
            done(model.cost(number) * len(batch))
        hidden = leaving
        del weights
    last = len(model.parts) - 1
    part, weights = model.parts[last], _read(model, last, settings.device)
    found = []
    for own, counted, states in zip(tokens, text.counted, hidden, strict=True):
        losses = _of_sequence(part, weights, own, states)
        found.append(losses[counted.to(losses.device)].mean())
        done(model.cost(last))
    return torch.stack(found).cpu()


def _of_sequence(part: Part, weights: Mapping[str, Tensor], tokens: Tensor, x: Tensor) -> Tensor:
    """The losses of one sequence, from the hidden states that leave the last block."""
    vocabulary = max((w.shape[0] for w in weights.values()), default=1)
    length = max(1, LOGITS // vocabulary)
    losses = [
        position_losses(part.run(weights, states[None])[0], targets)
        for states, targets in zip(
            torch.split(x[:-1], length), torch.split(tokens[1:], length), strict=True
        )
    ]
    return torch.cat(losses)


def _read(model: PartedModel, number: int, device: str) -> dict[str, Tensor]:
    """Weights of a part, fp32, rounded to the dtype of the evaluation."""
    own = model.weights[number]
    read = model.judged.read(model.decoder.names, dict.fromkeys(own.values()), device)
    floats = {name: tensor.to(model.dtype).float() for name, tensor in read.items()}
    return {relative: floats[name] for relative, name in own.items()}


def _batches(x: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(x), rows):
        yield first, x[first : first + rows]
