"""Builds decoders, and checks by running a model's blocks whether the model can run in parts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.build import OTHER_METHODS
from mergekit_dam.model.calls import block_calls, probe_weights
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.hooks import After, Stop, hooked, own_weights, replaced_forward, until
from mergekit_dam.model.skeleton import BlockCall, Skeleton, as_forward


def make_decoder(
    config: PretrainedConfig, device: torch.device, *, trust_remote_code: bool = False
) -> Decoder:
    """The decoder of a model.

    Args:
        config: Configuration of the model.
        device: Device of the forward passes.

    Raises:
        ArchitectureError: transformers cannot build the model, no list of decoder blocks is
            found in it, or its blocks cannot run one by one.
    """
    skeleton = Skeleton.build(config, trust_remote_code=trust_remote_code)
    decoder = Decoder(skeleton, device)
    _check_shared_weights(skeleton)
    name = skeleton.class_name
    try:
        width = hidden_size(decoder)
        skeleton = replace(skeleton, tuple_output=_detect_tuple_output(skeleton, width, device))
        block_calls(skeleton, 1, 2, device)
        alike = _reads_last_block_alone(skeleton, width, device)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ArchitectureError(
            f"the blocks of {name} cannot run one by one ({error}). {OTHER_METHODS}"
        ) from error
    if not alike:
        raise ArchitectureError(
            f"the output of {name} depends on more than the output of its last block; dam cannot "
            f"run its blocks one by one. {OTHER_METHODS}"
        )
    return Decoder(skeleton, device)


def hidden_size(decoder: Decoder) -> int:
    """Width of the residual stream, as it enters the first block.

    Raises:
        ArchitectureError: More than one hidden state per token enters the first block.
    """
    tokens = torch.zeros((1, 2), dtype=torch.long, device=decoder.device)
    entering = decoder.embed({}, tokens)
    if entering.shape[:-1] != tokens.shape:
        raise ArchitectureError(
            f"required one hidden state per token before the blocks of "
            f"{decoder.skeleton.class_name}, got {list(entering.shape)} for two tokens; dam "
            f"cannot run its blocks one by one. {OTHER_METHODS}"
        )
    return entering.shape[-1]


def input_or_output(
    decoder: Decoder, names: frozenset[str]
) -> dict[str, Literal["input", "output"]]:
    """Find which weights outside the blocks act before the blocks, and which act after them.

    Returns:
        Full name -> "input" or "output". Weights that a forward pass on text does not use are
        absent.
    """
    skeleton = decoder.skeleton
    used: dict[str, Literal["input", "output"]] = {}
    part: Literal["input", "output"] = "input"

    def enter_blocks(hidden: Tensor, _: BlockCall) -> Any:
        nonlocal part
        part = "output"
        return skeleton.wrap(hidden)

    def note(own: Sequence[str]) -> After:
        def hook(*_: Any) -> None:
            used.update({name: part for name in own if name not in used})

        return hook

    hooks = {}
    for module_name, module in skeleton.model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        own = [prefix + name for name in own_weights(module) if prefix + name in names]
        if own:
            hooks[module_name] = note(own)
    tokens = torch.zeros((1, 2), dtype=torch.long, device=decoder.device)
    with hooked(skeleton.model, after=hooks):
        skeleton.run({}, tokens, [enter_blocks] * len(skeleton.blocks))
    return used


def _check_shared_weights(skeleton: Skeleton) -> None:
    names = skeleton.names
    for alias, first in names.first.items():
        if names.block_of(alias) not in (None, names.block_of(first)):
            raise ArchitectureError(
                f"blocks of {skeleton.class_name} share weights ({alias} is {first}); dam fits "
                f"every block by itself. {OTHER_METHODS}"
            )


@torch.no_grad()
def _detect_tuple_output(skeleton: Skeleton, width: int, device: torch.device) -> bool:
    """Whether the model expects a block to return hidden states first in a tuple, not alone.

    Such a model takes element 0 of a block's output. Of a plain tensor, that is the first
    sequence: the batch dimension is lost.
    """
    hidden = torch.zeros((2, 3, width), device=device)
    try:
        leaving = _leaving(skeleton, [hidden] * len(skeleton.blocks))
    except (IndexError, RuntimeError, ValueError):
        return True
    return leaving.shape[:2] != hidden.shape[:2]


def _reads_last_block_alone(skeleton: Skeleton, width: int, device: torch.device) -> bool:
    hidden = torch.ones((1, 2, width), device=device)
    others = [hidden + index for index in range(1, len(skeleton.blocks))]
    first = _leaving(skeleton, [hidden] * len(skeleton.blocks))
    return torch.equal(first, _leaving(skeleton, [*others, hidden]))


@torch.no_grad()
def _leaving(skeleton: Skeleton, hidden: Sequence[Tensor]) -> Tensor:
    """The input of the head (else the logits), if each block returns the given hidden states."""
    weights = probe_weights(skeleton, 0, hidden[0].device)
    if skeleton.head is None:
        logits: Tensor = skeleton.pass_through(weights, hidden).logits
        return logits
    leaving: list[Tensor] = []
    left = Stop()

    def stop(x: Tensor, _: BlockCall) -> Any:
        leaving.append(x)
        raise left

    with until(left), replaced_forward([(skeleton.head, as_forward(stop))]):
        skeleton.pass_through(weights, hidden)
    return leaving[0]
