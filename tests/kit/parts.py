"""Parts of tiny models, with their weights."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.part import Part
from mergekit_dam.model.probe import input_or_output, make_decoder
from mergekit_dam.sources.stage import StageKind
from tests.kit.models import ARCHITECTURES, make_model
from tests.kit.tensors import CPU


def part_and_weights(
    architecture: str | PretrainedConfig, make: Callable[[Decoder], Part]
) -> tuple[Part, dict[str, Tensor]]:
    """A part of a tiny model with its weights, by relative names; tied ones left out."""
    config = ARCHITECTURES[architecture]() if isinstance(architecture, str) else architecture
    model = make_model(config)
    decoder = make_decoder(model.config, CPU)
    part = make(decoder)
    outside = part.prefix == ""
    weights = {
        full.removeprefix(part.prefix): parameter.detach().clone()
        for full, parameter in model.named_parameters()
        if (decoder.names.block_of(full) is None if outside else full.startswith(part.prefix))
    }
    if outside:
        places = input_or_output(decoder, frozenset(weights))
        weights = {n: w for n, w in weights.items() if places[n] == part.label}
    return part, weights


def of_block(decoder: Decoder, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one block, by relative names."""
    prefix = f"{decoder.names.block_name(index)}."
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


@torch.no_grad()
def streamed(decoder: Decoder, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits by input, blocks and output, each given its own weights alone."""
    outside = {n: w for n, w in weights.items() if decoder.names.block_of(n) is None}
    hidden = decoder.embed(outside, tokens)
    for index in range(len(decoder.blocks)):
        hidden = decoder.run_block(index, of_block(decoder, index, weights), hidden)
    return decoder.logits(outside, hidden)


def stages_of(decoder: Decoder) -> list[tuple[StageKind, int]]:
    """Kind and index of every stage, in the order of the data."""
    blocks: list[tuple[StageKind, int]] = [("block", i) for i in range(len(decoder.blocks))]
    return [("input", 0), *blocks, ("output", 0)]


def stage_of(decoder: Decoder, name: str) -> tuple[str, int]:
    """Kind and index of the stage of a weight."""
    block = decoder.names.block_of(name)
    if block is not None:
        return "block", block
    return input_or_output(decoder, frozenset([name]))[name], 0


@torch.no_grad()
def hidden_of(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    decoder: Decoder | None = None,
) -> Tensor:
    """The output of the last block of a whole model, run with other weights."""
    left: list[Tensor] = []

    def keep(_: object, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    decoder = decoder or make_decoder(model.config, CPU)
    last = decoder.names.block_name(len(decoder.blocks) - 1)
    handle = model.get_submodule(last).register_forward_hook(keep)
    functional_call(model, dict(weights), (tokens,), {"use_cache": False})
    handle.remove()
    return left[0]
