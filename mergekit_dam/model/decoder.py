"""A causal language model that runs in parts: its input, any block, or its output.

One block can run while no other weight of the model is in memory. Blocks that run one by one give
exactly the result of the whole model's forward pass. `probe.make_decoder` builds decoders, and
refuses models that cannot run in parts.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig

from mergekit_dam.model.calls import block_calls
from mergekit_dam.model.hooks import Stop, until
from mergekit_dam.model.names import WeightNames
from mergekit_dam.model.skeleton import BlockCall, Skeleton, Weights


class Decoder:
    """Runs the input, any block, or the output of a causal language model.

    Args:
        skeleton: The model without weights.
        device: Device of the forward passes; weights and hidden states must be on it.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        self.skeleton = skeleton
        self.device = device
        self._move_buffers()

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the model."""
        return self.skeleton.config

    @property
    def model(self) -> nn.Module:
        """The module tree."""
        return self.skeleton.model

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.skeleton.blocks

    @property
    def names(self) -> WeightNames:
        """The names of the weights."""
        return self.skeleton.names

    @property
    def head_name(self) -> str | None:
        """Path of the module that computes logits from hidden states, or None."""
        head = self.skeleton.head
        return next((name for name, module in self.model.named_modules() if module is head), None)

    def move(self, device: torch.device) -> None:
        """Run on `device` from now on; weights must then be on it."""
        if self.device != device:
            self.device = device
            self._calls.cache_clear()
            self._move_buffers()

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def embed(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Hidden states `[batch, length, hidden]` that enter the first block.

        Args:
            weights: Full name -> tensor, for the parameters before the blocks.
            tokens: Token ids, int64 `[batch, length]`.
        """
        entering: list[Tensor] = []
        entered = Stop()

        def stop(hidden: Tensor, _: BlockCall) -> Tensor:
            entering.append(hidden)
            raise entered

        with until(entered):
            self.skeleton.run(weights, tokens, [stop])
        return entering[0]

    def run_block(self, index: int, weights: Weights, hidden: Tensor) -> Tensor:
        """Hidden states `[batch, length, hidden]` that leave block `index`.

        Args:
            weights: Name relative to the block -> tensor, for the block's parameters.
            hidden: Hidden states that enter the block, of the same shape.
        """
        batch, length, _ = hidden.shape
        call = self._calls(batch, length)[index]
        output: Any = functional_call(
            self.blocks[index],
            dict(weights),
            (hidden, *call.args),
            dict(call.kwargs),
            tie_weights=False,
        )
        left: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return left

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """Logits `[batch, length, vocabulary]` from the hidden states that leave the last block.

        Args:
            weights: Full name -> tensor, for the parameters after the blocks.
        """
        output = self.skeleton.pass_through(weights, [hidden] * len(self.blocks))
        logits: Tensor = output.logits
        return logits

    @lru_cache(maxsize=4)  # noqa: B019 (a decoder lives as long as the merge)
    def _calls(self, batch: int, length: int) -> tuple[BlockCall, ...]:
        return block_calls(self.skeleton, batch, length, self.device)
