"""A causal language model without weights, whose blocks can be replaced while it runs.

transformers' own classes build the module tree on the meta device; every call passes its weights
in (`torch.func.functional_call`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_dam.model.build import build_model, find_blocks
from mergekit_dam.model.hooks import replaced_forward
from mergekit_dam.model.names import WeightNames

Weights: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block besides hidden states: masks, positions, flags."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


BlockForward: TypeAlias = Callable[[Any, BlockCall], Any]
"""Replaces a block's own forward; called with hidden states and the other arguments."""


@dataclass(frozen=True)
class Skeleton:
    """The module tree of a model, and its decoder blocks.

    Attributes:
        config: Configuration of the model.
        model: Module tree.
        blocks: Decoder blocks in that tree.
        names: Names of the model's weights.
        tuple_output: Whether blocks return hidden states first in a tuple, not alone.
    """

    config: PretrainedConfig
    model: nn.Module
    blocks: nn.ModuleList
    names: WeightNames
    tuple_output: bool = False

    @classmethod
    def build(cls, config: PretrainedConfig, *, trust_remote_code: bool = False) -> "Skeleton":
        """Build the skeleton of a model from its configuration.

        Raises:
            ArchitectureError: transformers cannot build the model, or no list of decoder blocks is
                found in it.
        """
        model = build_model(config, trust_remote_code=trust_remote_code)
        blocks_name, blocks = find_blocks(model)
        return cls(config, model, blocks, WeightNames.of(model, blocks_name))

    @property
    def head(self) -> nn.Module | None:
        """The module that computes logits from hidden states, or None."""
        head: nn.Module | None = cast(PreTrainedModel, self.model).get_output_embeddings()
        return head

    @property
    def class_name(self) -> str:
        """The name of the model's class in transformers, for error messages."""
        return type(self.model).__name__

    def wrap(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which a block of this model returns them."""
        return (hidden,) if self.tuple_output else hidden

    def run(self, weights: Weights, tokens: Tensor, forwards: Sequence[BlockForward]) -> Any:
        """Run the model with other functions in place of its first blocks.

        Args:
            weights: Full name -> tensor, for weights outside the blocks; weights that are not
                given are zeros, which take no memory.
            tokens: Token ids, int64 `[batch, length]`.
            forwards: Functions that replace the first blocks, one per block.

        Returns:
            The model's output.
        """
        pairs = zip(self.blocks, forwards, strict=False)
        with replaced_forward((block, as_forward(own)) for block, own in pairs):
            return self._forward(weights, tokens)

    def pass_through(self, weights: Weights, hidden: Sequence[Tensor]) -> Any:
        """Run the model with blocks that return the given hidden states, one tensor per block."""
        batch, length, _ = hidden[0].shape
        tokens = torch.zeros((batch, length), dtype=torch.long, device=hidden[0].device)
        return self.run(weights, tokens, [partial(_put_out, self.wrap(own)) for own in hidden])

    def _forward(self, weights: Weights, tokens: Tensor) -> Any:
        zero = torch.zeros((), device=tokens.device)
        given = {
            name: weights[first] if first in weights else zero.expand(shape)
            for name, (first, shape) in self._outside.items()
        }
        given |= {name: weights[name] for name in self._buffers if name in weights}
        flags = {"use_cache": False}
        if getattr(self.config, "output_router_logits", False):  # used only by a training loss
            flags["output_router_logits"] = False
        return functional_call(self.model, given, (tokens,), flags, tie_weights=False)

    @cached_property
    def _outside(self) -> dict[str, tuple[str, torch.Size]]:
        """Every name of a parameter outside the blocks -> the first of its names, and its shape.

        It is made once: a walk through all modules for every call would take as long as the model
        is deep.
        """
        named = self.model.named_parameters(remove_duplicate=False)
        return {
            name: (self.names.first.get(name, name), parameter.shape)
            for name, parameter in named
            if self.names.block_of(name) is None
        }

    @cached_property
    def _buffers(self) -> tuple[str, ...]:
        """Names of the buffers outside the blocks."""
        names = (name for name, _ in self.model.named_buffers())
        return tuple(name for name in names if self.names.block_of(name) is None)


def as_forward(forward: BlockForward) -> Callable[..., Any]:
    """A module's `forward` that calls the given function, however hidden states are passed."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(args[0], BlockCall(args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return forward(hidden, BlockCall((), kwargs))

    return replacement


def _put_out(output: Any, *_: Any) -> Any:
    return output
