"""A causal language model without weights, whose blocks can be replaced while it runs.

The module tree comes from transformers' own classes, on the meta device; weights are handed in for
each call (`torch.func.functional_call`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    """What the model passes to a block besides hidden states: masks, positions, flags."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


BlockForward: TypeAlias = Callable[[Any, BlockCall], Any]
"""Called with hidden states and the rest of the call, in place of a block's own forward."""


@dataclass(frozen=True)
class Skeleton:
    """The module tree of a model, and its decoder blocks.

    Attributes:
        config: configuration of the model.
        names: what its weights are called.
        tuple_output: blocks return their hidden states first in a tuple, not alone.
    """

    config: PretrainedConfig
    model: nn.Module
    blocks: nn.ModuleList
    names: WeightNames
    tuple_output: bool = False

    @classmethod
    def build(cls, config: PretrainedConfig, *, trust_remote_code: bool = False) -> "Skeleton":
        """The model of a configuration.

        Raises:
            ArchitectureError: transformers cannot build the model, or no list of decoder blocks is
                found in it.
        """
        model = build_model(config, trust_remote_code=trust_remote_code)
        blocks_name, blocks = find_blocks(model)
        return cls(config, model, blocks, WeightNames.of(model, blocks_name))

    @property
    def head(self) -> nn.Module | None:
        """The module that makes logits of hidden states."""
        head: nn.Module | None = cast(PreTrainedModel, self.model).get_output_embeddings()
        return head

    @property
    def class_name(self) -> str:
        """The name of transformers' class, for errors."""
        return type(self.model).__name__

    def wrap(self, hidden: Tensor) -> Any:
        """Hidden states as a block of this model returns them."""
        return (hidden,) if self.tuple_output else hidden

    def run(self, weights: Weights, tokens: Tensor, forwards: Sequence[BlockForward]) -> Any:
        """Run the model with other functions in place of its first blocks.

        Args:
            weights: full names of weights outside of the blocks -> tensors; those that are not
                given are zeros that take no memory.
            tokens: int64 `[batch, length]`.
            forwards: one for each block that is replaced, from the first.

        Returns:
            The model's output.
        """
        pairs = zip(self.blocks, forwards, strict=False)
        with replaced_forward((block, _as_forward(own)) for block, own in pairs):
            return self._forward(weights, tokens)

    def pass_through(self, weights: Weights, hidden: Sequence[Tensor]) -> Any:
        """Run input and output of the model around blocks that put out what is given for each."""
        batch, length, _ = hidden[0].shape
        tokens = torch.zeros((batch, length), dtype=torch.long, device=hidden[0].device)
        return self.run(weights, tokens, [partial(_put_out, self.wrap(own)) for own in hidden])

    def _forward(self, weights: Weights, tokens: Tensor) -> Any:
        zero = torch.zeros((), device=tokens.device)
        given = {
            name: weights[name] if name in weights else zero.expand(parameter.shape)
            for name, parameter in self.model.named_parameters()
            if self.names.block_of(name) is None
        }
        for name, _ in self.model.named_buffers():
            if name in weights and self.names.block_of(name) is None:
                given[name] = weights[name]
        flags = {"use_cache": False}
        if getattr(self.config, "output_router_logits", False):  # for a loss of theirs, in training
            flags["output_router_logits"] = False
        return functional_call(self.model, given, (tokens,), flags, tie_weights=True)


def _as_forward(forward: BlockForward) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(args[0], BlockCall(args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return forward(hidden, BlockCall((), kwargs))

    return replacement


def _put_out(output: Any, *_: Any) -> Any:
    return output
