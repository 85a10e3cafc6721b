"""A part of a model, as the fit runs it: its module, its names, its forward function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mergekit_dam.model.anatomy import examine, scattered
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.hooks import Captured, capture, substitute, watch
from mergekit_dam.model.units import Anatomy

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Part:
    """The input, one block, or the output of a model.

    Attributes:
        label: Name of the part in messages and logs.
        prefix: Prefix of the names of its parameters in the whole model.
        root: Module that the names are relative to.
        forward: Function from weights (by relative names) and the input to the output.
        residual: Whether the part adds to a residual stream that passes through it.
        dtype: Dtype of the products in a run; hidden states that enter and leave are fp32.
    """

    label: str
    prefix: str
    root: nn.Module
    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    residual: bool = False
    dtype: torch.dtype = torch.float32

    def run(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The output of the part, fp32.

        With a half-precision `dtype`, only products have it (as in `torch.autocast`); norms and
        the residual stream stay fp32.
        """
        half = self.dtype != torch.float32
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=half):
            return self.forward(weights, x).float()

    def as_run(self, tensor: Tensor) -> Tensor:
        """A weight as the part runs with it."""
        kept = runs_as_stored(tensor.ndim == 2, tensor.dtype, self.dtype)
        return tensor if kept else tensor.float()

    def captured(
        self,
        weights: Mapping[str, Tensor],
        x: Tensor,
        *,
        inputs: tuple[str, ...] = (),
        outputs: tuple[str, ...] = (),
        known: Mapping[str, Tensor] | None = None,
    ) -> Captured:
        """Run until the inputs and outputs of the named units are captured.

        Args:
            known: Outputs of units that need not be computed again.
        """
        with (
            capture(self.root, inputs=inputs, outputs=outputs) as captured,
            substitute(self.root, known or {}),
        ):
            self.run(weights, x)
        return captured

    def through(
        self,
        weights: Mapping[str, Tensor],
        x: Tensor,
        *,
        outputs: tuple[str, ...] = (),
        known: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Captured]:
        """Run to the end; return the part's output and the outputs of the named units."""
        with (
            capture(self.root, outputs=outputs, stop=False) as captured,
            substitute(self.root, known or {}),
        ):
            leaving = self.run(weights, x)
        return leaving, captured

    def watched(
        self, weights: Mapping[str, Tensor], x: Tensor, *, outputs: tuple[str, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run to the end; return the part's output and the named outputs in its autograd graph."""
        with watch(self.root, outputs) as seen:
            leaving = self.run(weights, x)
        return leaving, seen

    def anatomy(self, weights: Mapping[str, Tensor], like: Tensor) -> Anatomy:
        """Examine the part on a few random tokens.

        Args:
            weights: Weights of the part, by relative names.
            like: An input of the part, for its kind and width: token ids or hidden states.
        """
        weights = scattered({name: weight.float() for name, weight in weights.items()})
        if not like.is_floating_point():
            tokens = torch.arange(_PROBE_TOKENS, device=like.device)[None]
            return examine(self.root, lambda: self.forward(weights, tokens), weights)
        generator = torch.Generator(like.device).manual_seed(0)
        hidden = torch.randn(
            1, _PROBE_TOKENS, like.shape[-1], generator=generator, device=like.device
        )
        source = hidden if self.residual else None
        return examine(self.root, lambda: self.forward(weights, hidden), weights, source)


def runs_as_stored(matrix: bool, stored: torch.dtype, products: torch.dtype) -> bool:
    """Whether a part runs with a weight as it is stored, not with a copy in fp32.

    Args:
        matrix: whether the weight has two dimensions.
        stored: its dtype.
        products: dtype of the part's products.
    """
    return stored == torch.float32 or (matrix and stored == products)


def input_part(decoder: Decoder) -> Part:
    """The part from token ids to the hidden states that enter the first block."""
    return Part("input", "", decoder.model, decoder.embed)


def block_part(decoder: Decoder, index: int, dtype: torch.dtype = torch.float32) -> Part:
    """One decoder block; its products are computed in `dtype`."""

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return decoder.run_block(index, weights, hidden)

    label = f"block {index + 1}/{len(decoder.blocks)}"
    prefix = f"{decoder.names.block_name(index)}."
    return Part(label, prefix, decoder.blocks[index], run, residual=True, dtype=dtype)


def output_part(decoder: Decoder) -> Part:
    """The part from the hidden states that leave the last block to logits."""
    return Part("output", "", decoder.model, decoder.logits)


def without_tokens(part: Part, unknown: Tensor) -> Part:
    """The output part of a model that does not have some tokens: they get probability 0.

    Args:
        unknown: Mask of the tokens that the model does not have, bool `[vocabulary]`.
    """

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return part.forward(weights, hidden).masked_fill(unknown.to(hidden.device), -torch.inf)

    return replace(part, forward=run)
