"""A causal language model without weights, cut into input, blocks and output.

The module tree comes from transformers' own classes, on the meta device; weights are handed
in for each call (`torch.func.functional_call`), so that one block of a model can run while
no other weight of it is in memory. Streamed blocks equal the whole model's forward exactly.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from mergekit_dam.errors import ArchitectureError

Weights = Mapping[str, Tensor]


class _Stop(Exception):
    """Ends a forward pass early, once all that was asked for is recorded."""


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to a block besides hidden states: masks, positions, flags."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Decoder:
    """Runs the input, any block, or the output of a causal language model.

    Args:
        config: configuration of the model.
        device: where the forward passes run; weights and hidden states are expected there.

    Raises:
        ArchitectureError: transformers cannot build the model, no list of decoder blocks is
            found in it, or its blocks cannot run one by one.
    """

    def __init__(
        self, config: PretrainedConfig, device: torch.device, *, trust_remote_code: bool = False
    ) -> None:
        self.config = config
        try:
            # include_buffers=False: on a plain meta device rotary frequencies would be lost.
            with init_empty_weights(include_buffers=False), no_init_weights():
                # Experts one after the other: grouped products would take copies of all of them.
                model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=trust_remote_code, experts_implementation="eager"
                )
        except (ValueError, KeyError, ImportError) as error:
            raise ArchitectureError(
                f"transformers builds no causal language model from {config.architectures}: {error}"
            ) from error
        model.tie_weights()
        self.model: nn.Module = model.eval()
        self.move(device)
        self.blocks_name, self.blocks = _find_blocks(self.model)
        self._names = self._canonical_names()
        self._wrap: Callable[[Tensor], Any] = self._learn_wrap()
        self._check_blocks()

    def _canonical_names(self) -> dict[str, str]:
        """Name of every parameter -> first name of that parameter (tied ones share it).

        Buffers that are saved act as parameters do (a router's correction of its scores).
        """
        first: dict[int, str] = {}
        return {
            name: first.setdefault(id(tensor), name)
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if tensor.is_floating_point()
        }

    def move(self, device: torch.device) -> None:
        """Run on a device from now on; weights are handed in there."""
        if getattr(self, "device", None) == device:
            return
        self.device = device
        self.calls.cache_clear()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    @property
    def head_name(self) -> str | None:
        """Path of the module that makes logits of hidden states."""
        head = cast(PreTrainedModel, self.model).get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if module is head), None)

    def canonical(self, name: str) -> str | None:
        """The first name of a tied parameter, or None if the model has no such parameter."""
        return self._names.get(name)

    def block_of(self, name: str) -> int | None:
        """Index of the block that a parameter belongs to, or None."""
        prefix = f"{self.blocks_name}."
        if not name.startswith(prefix):
            return None
        index = name[len(prefix) :].split(".", 1)[0]
        return int(index) if index.isdigit() else None

    def block_name(self, index: int) -> str:
        """Prefix of the parameters of a block, without the trailing dot."""
        return f"{self.blocks_name}.{index}"

    def embed(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Hidden states `[batch, length, hidden]` that enter the first block.

        Args:
            weights: full parameter names -> tensors, of the part before the blocks.
            tokens: int64 `[batch, length]`.
        """
        entering: list[Tensor] = []

        def stop(hidden: Tensor, _: BlockCall) -> Tensor:
            entering.append(hidden)
            raise _Stop

        with _replaced_forward(self.blocks[0], stop), contextlib.suppress(_Stop):
            self._forward(weights, tokens)
        return entering[0]

    def run_block(self, index: int, weights: Weights, hidden: Tensor) -> Tensor:
        """Hidden states `[batch, length, hidden]` that leave block `index`.

        Args:
            weights: parameter names relative to the block -> tensors.
            hidden: hidden states that enter it.
        """
        batch, length, _ = hidden.shape
        call = self.calls(batch, length)[index]
        output = functional_call(
            self.blocks[index],
            dict(weights),
            (hidden, *call.args),
            dict(call.kwargs),
            tie_weights=False,
        )
        return _first_tensor(output)

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """Logits `[batch, length, vocabulary]` from the hidden states that leave the last block.

        Args:
            weights: full parameter names -> tensors, of the part after the blocks.
        """
        output = self._pass_through(weights, hidden)
        logits: Tensor = output.logits
        return logits

    @lru_cache(maxsize=4)  # noqa: B019 (a decoder lives as long as the merge)
    def calls(self, batch: int, length: int) -> tuple[BlockCall, ...]:
        """What each block is called with for `batch` sequences of `length` tokens.

        Raises:
            ArchitectureError: a block is handed something that depends on the text, beyond
                hidden states (cross-layer caches, per-layer inputs).
        """
        first, second = (
            self._record_calls(torch.full((batch, length), token, device=self.device))
            for token in (0, 1)
        )
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if not _same((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs))):
                raise ArchitectureError(
                    f"block {index} of {type(self.model).__name__} is handed more than hidden "
                    f"states that depends on the text; dam cannot run its blocks one by one. "
                    f"Merge this architecture with one of mergekit's other methods."
                )
        return first

    @torch.no_grad()
    def _learn_wrap(self) -> Callable[[Tensor], Any]:
        """Learn how blocks return their hidden states: alone, or first in a tuple.

        A model that takes the first of a tuple takes the first sequence of a plain tensor,
        and loses a dimension.
        """
        self._wrap = lambda hidden: hidden
        hidden = torch.zeros((1, 2, self._hidden_size()), device=self.device)
        try:
            plain = self._pass_through({}, hidden).logits.ndim == hidden.ndim
        except (IndexError, RuntimeError, ValueError):
            plain = False
        return self._wrap if plain else lambda hidden: (hidden,)

    def _hidden_size(self) -> int:
        """Width of the residual stream: that of what enters the first block."""
        return self.embed({}, torch.zeros((1, 2), dtype=torch.long, device=self.device)).shape[-1]

    def _record_calls(self, tokens: Tensor) -> tuple[BlockCall, ...]:
        calls: list[BlockCall] = []

        def record(hidden: Tensor, call: BlockCall) -> Any:
            calls.append(call)
            if len(calls) == len(self.blocks):
                raise _Stop
            return self._wrap(hidden)

        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_replaced_forward(block, record))
            stack.enter_context(contextlib.suppress(_Stop))
            self._forward(self._telling_weights(), tokens)
        return tuple(calls)

    def _telling_weights(self) -> dict[str, Tensor]:
        """Weights outside the blocks that give every token an embedding of its own.

        Every row is filled with its number, which takes no memory beyond one column.
        """
        weights = {}
        for name, parameter in self.model.named_parameters():
            if self.block_of(name) is None:
                count = parameter.shape[0] if parameter.ndim else 1
                rows = torch.arange(1.0, 1.0 + count, device=self.device)
                shape = [-1, *[1] * (parameter.ndim - 1)] if parameter.ndim else []
                weights[name] = rows.reshape(shape).expand(parameter.shape)
        return weights

    def _check_blocks(self) -> None:
        """See on two tokens that the blocks can run one by one."""
        try:
            self.calls(1, 2)
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            raise ArchitectureError(
                f"the blocks of {type(self.model).__name__} cannot run one by one ({error}). "
                f"Merge this architecture with one of mergekit's other methods."
            ) from error

    def _pass_through(self, weights: Weights, hidden: Tensor) -> Any:
        """Run input and output of the model around blocks that hand `hidden` through."""
        batch, length, _ = hidden.shape
        tokens = torch.zeros((batch, length), dtype=torch.long, device=self.device)
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_replaced_forward(block, lambda *_: self._wrap(hidden)))
            return self._forward(weights, tokens)

    def _forward(self, weights: Weights, tokens: Tensor) -> Any:
        """Forward of the module tree; weights not given are zeros that take no memory."""
        zero = torch.zeros((), device=self.device)
        given = {
            name: weights[name] if name in weights else zero.expand(parameter.shape)
            for name, parameter in self.model.named_parameters()
            if self.block_of(name) is None
        }
        flags = {"use_cache": False}
        if getattr(self.config, "output_router_logits", False):  # for a loss of theirs, in training
            flags["output_router_logits"] = False
        return functional_call(self.model, given, (tokens,), flags, tie_weights=True)

    def part_of(self, names: frozenset[str]) -> dict[str, Literal["input", "output"]]:
        """Tell for parameters outside the blocks whether they act before or after them.

        Returns:
            full name -> "input" or "output"; parameters that a forward on text does not use
            are absent.
        """
        used: dict[str, Literal["input", "output"]] = {}
        part: Literal["input", "output"] = "input"
        handles = []

        def enter_blocks(hidden: Tensor, _: BlockCall) -> Any:
            nonlocal part
            part = "output"
            return self._wrap(hidden)

        for module_name, module in self.model.named_modules():
            own = [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
            own = [name for name in own if name in names]
            if own:
                handles.append(
                    module.register_forward_hook(
                        lambda *_, own=own: used.update({n: part for n in own if n not in used})
                    )
                )
        try:
            with contextlib.ExitStack() as stack:
                for block in self.blocks:
                    stack.enter_context(_replaced_forward(block, enter_blocks))
                self._forward({}, torch.zeros((1, 2), dtype=torch.long, device=self.device))
        finally:
            for handle in handles:
                handle.remove()
        return used


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of `num_hidden_layers` decoder layers in a model."""
    layers = getattr(model.config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layers
        and all(isinstance(member, GradientCheckpointingLayer) for member in module)
    ]
    if len(found) != 1:
        raise ArchitectureError(
            f"required one list of {layers} decoder blocks in {type(model).__name__}, "
            f"found {len(found)}; dam cannot cut this architecture into blocks. Merge it with "
            f"one of mergekit's other methods."
        )
    return found[0]


@contextlib.contextmanager
def _replaced_forward(
    block: nn.Module, forward: Callable[[Tensor, BlockCall], Any]
) -> Iterator[None]:
    """Call `forward(hidden, rest of the call)` in place of a block's own forward."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(args[0], BlockCall(args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return forward(hidden, BlockCall((), kwargs))

    block.forward = replacement
    try:
        yield
    finally:
        del block.forward


def _first_tensor(output: Any) -> Tensor:
    """Blocks return their hidden states alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _same(a: Any, b: Any) -> bool:
    """Equality of nested call arguments, tensors by value."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b)
