"""A causal language model without weights, cut into input, blocks and output.

The module tree comes from transformers' own classes, on the meta device; weights are handed
in for each call (`torch.func.functional_call`), so that one block of a model can run while
no other weight of it is in memory. Streamed blocks equal the whole model's forward exactly.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.build import OTHER_METHODS, build_model, find_blocks
from mergekit_dam.model.names import WeightNames

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
        model = build_model(config, trust_remote_code=trust_remote_code)
        self.model: nn.Module = model
        self.names = WeightNames.of(model)
        self.move(device)
        self.blocks_name, self.blocks = find_blocks(model)
        self._wrap: Callable[[Tensor], Any] = lambda hidden: hidden
        self._check_blocks()

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

    def in_model(self, name: str) -> str | None:
        """A weight's name in the model, for its name in a checkpoint; None if it has no such."""
        return self.names.in_model(name)

    def canonical(self, name: str) -> str | None:
        """The first name of a weight (tied ones have several), or None if the model has none."""
        found = self.in_model(name)
        return None if found is None else self.names.first[found]

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
        logits: Tensor = self._pass_through(weights, [hidden] * len(self.blocks)).logits
        return logits

    @lru_cache(maxsize=4)  # noqa: B019 (a decoder lives as long as the merge)
    def calls(self, batch: int, length: int) -> tuple[BlockCall, ...]:
        """What each block is called with for `batch` sequences of `length` tokens.

        Raises:
            ArchitectureError: a block is handed something that depends on the text, beyond
                hidden states (cross-layer caches, per-layer inputs).
        """
        (first, chained), (second, _) = (
            self._record_calls(torch.full((batch, length), number, device=self.device), number)
            for number in (0, 1)
        )
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if not _same((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs))):
                raise ArchitectureError(
                    f"block {index} of {type(self.model).__name__} is handed more than hidden "
                    f"states that depends on the text, or on weights outside of it; dam cannot run "
                    f"its blocks one by one. {OTHER_METHODS}"
                )
            for value in (*a.args, *a.kwargs.values()):
                if not _is_constant(value):
                    raise ArchitectureError(
                        f"block {index} of {type(self.model).__name__} is handed a "
                        f"{type(value).__name__}, in which blocks can leave something for others "
                        f"(a shared cache, say); dam cannot run them one by one. {OTHER_METHODS}"
                    )
        if chained < len(self.blocks):
            raise ArchitectureError(
                f"what enters block {chained} of {type(self.model).__name__} is not what block "
                f"{chained - 1} puts out; dam cannot run its blocks one by one. {OTHER_METHODS}"
            )
        return first

    @torch.no_grad()
    def _detect_tuple_output(self) -> Callable[[Tensor], Any]:
        """Learn how blocks return their hidden states: alone, or first in a tuple.

        A model that takes the first of a tuple takes the first sequence of a plain tensor.
        """
        hidden = torch.zeros((2, 3, self._hidden_size()), device=self.device)
        try:
            plain = self._leaving([hidden] * len(self.blocks)).shape[:2] == hidden.shape[:2]
        except (IndexError, RuntimeError, ValueError):
            plain = False
        return self._wrap if plain else lambda hidden: (hidden,)

    def _hidden_size(self) -> int:
        """Width of the residual stream: that of what enters the first block."""
        tokens = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        entering = self.embed({}, tokens)
        if entering.shape[:-1] != tokens.shape:
            raise ArchitectureError(
                f"required one hidden state a token before the blocks of "
                f"{type(self.model).__name__}, got {list(entering.shape)} of two tokens; dam "
                f"cannot run its blocks one by one. {OTHER_METHODS}"
            )
        return entering.shape[-1]

    def _record_calls(self, tokens: Tensor, number: int) -> tuple[tuple[BlockCall, ...], int]:
        """What every block is called with, and how many are fed what the one before puts out.

        Args:
            number: the weights outside of the blocks differ by it.
        """
        calls: list[BlockCall] = []
        entered: list[Any] = []
        left: list[Any] = []

        def record(hidden: Any, call: BlockCall) -> Any:
            calls.append(call)
            entered.append(hidden)
            if len(calls) == len(self.blocks):
                raise _Stop
            left.append(hidden + len(calls) if isinstance(hidden, Tensor) else hidden)
            return self._wrap(left[-1])

        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_replaced_forward(block, record))
            stack.enter_context(contextlib.suppress(_Stop))
            self._forward(self._probe_weights(number), tokens)
        pairs = zip(left, entered[1:], strict=False)
        broken = (i for i, (a, b) in enumerate(pairs, 1) if not _same(a, b))
        return tuple(calls), next(broken, len(calls))

    def _probe_weights(self, number: int) -> dict[str, Tensor]:
        """Weights outside the blocks that give every token an embedding of its own.

        Every row is filled with its number plus `number`: no memory beyond one column.
        """
        weights = {}
        for name, parameter in self.model.named_parameters():
            if self.block_of(name) is None:
                count = parameter.shape[0] if parameter.ndim else 1
                rows = torch.arange(1.0, 1.0 + count, device=self.device) + number
                shape = [-1, *[1] * (parameter.ndim - 1)] if parameter.ndim else []
                weights[name] = rows.reshape(shape).expand(parameter.shape)
        return weights

    def _check_blocks(self) -> None:
        """See on two tokens that the blocks can run one by one, and nothing but the last is read.

        Raises:
            ArchitectureError: they cannot.
        """
        name = type(self.model).__name__
        for alias, first in self.names.first.items():
            if self.block_of(alias) not in (None, self.block_of(first)):
                raise ArchitectureError(
                    f"blocks of {name} share weights ({alias} is {first}); dam fits every block by "
                    f"itself. {OTHER_METHODS}"
                )
        try:
            self._wrap = self._detect_tuple_output()
            self.calls(1, 2)
            hidden = torch.ones((1, 2, self._hidden_size()), device=self.device)
            others = [hidden + index for index in range(1, len(self.blocks))]
            alike = torch.equal(
                self._leaving([hidden] * len(self.blocks)), self._leaving([*others, hidden])
            )
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ArchitectureError(
                f"the blocks of {name} cannot run one by one ({error}). {OTHER_METHODS}"
            ) from error
        if not alike:
            raise ArchitectureError(
                f"the output of {name} reads more than what its last block puts out; dam cannot "
                f"run its blocks one by one. {OTHER_METHODS}"
            )

    @torch.no_grad()
    def _leaving(self, hidden: Sequence[Tensor]) -> Tensor:
        """What enters the head, if each block puts out the hidden states given for it."""
        head = cast(PreTrainedModel, self.model).get_output_embeddings()
        weights = self._probe_weights(0)
        if head is None:
            logits: Tensor = self._pass_through(weights, hidden).logits
            return logits
        leaving: list[Tensor] = []

        def stop(x: Tensor, _: BlockCall) -> Any:
            leaving.append(x)
            raise _Stop

        with _replaced_forward(head, stop), contextlib.suppress(_Stop):
            self._pass_through(weights, hidden)
        return leaving[0]

    def _pass_through(self, weights: Weights, hidden: Sequence[Tensor]) -> Any:
        """Run input and output of the model around blocks that put out what is given for each."""
        batch, length, _ = hidden[0].shape
        tokens = torch.zeros((batch, length), dtype=torch.long, device=self.device)
        with contextlib.ExitStack() as stack:
            for block, output in zip(self.blocks, hidden, strict=True):
                forward = partial(_hand_on, self._wrap(output))
                stack.enter_context(_replaced_forward(block, forward))
            return self._forward(weights, tokens)

    def _forward(self, weights: Weights, tokens: Tensor) -> Any:
        """Forward of the module tree; parameters not given are zeros that take no memory."""
        zero = torch.zeros((), device=self.device)
        given = {
            name: weights[name] if name in weights else zero.expand(parameter.shape)
            for name, parameter in self.model.named_parameters()
            if self.block_of(name) is None
        }
        for name, _ in self.model.named_buffers():
            if name in weights and self.block_of(name) is None:
                given[name] = weights[name]
        flags = {"use_cache": False}
        if getattr(self.config, "output_router_logits", False):  # for a loss of theirs, in training
            flags["output_router_logits"] = False
        return functional_call(self.model, given, (tokens,), flags, tie_weights=True)

    def input_or_output(self, names: frozenset[str]) -> dict[str, Literal["input", "output"]]:
        """Tell for weights outside the blocks whether they act before or after them.

        Returns:
            full name -> "input" or "output"; weights that a forward on text does not use are
            absent.
        """
        used: dict[str, Literal["input", "output"]] = {}
        part: Literal["input", "output"] = "input"
        handles = []

        def enter_blocks(hidden: Tensor, _: BlockCall) -> Any:
            nonlocal part
            part = "output"
            return self._wrap(hidden)

        for module_name, module in self.model.named_modules():
            prefix = f"{module_name}." if module_name else ""
            own = [prefix + name for name in own_weights(module)]
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


def own_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and buffers that are a module's own."""
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return tuple(name for name, _ in named)


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


def _hand_on(output: Any, *_: Any) -> Any:
    return output


def _first_tensor(output: Any) -> Tensor:
    """Blocks return their hidden states alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _same(a: Any, b: Any) -> bool:
    """Equality of nested call arguments, tensors by value."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(type(a) is type(b) and (a == b or not _is_constant(a)))


def _is_constant(value: Any) -> bool:
    """Whether what a block is handed is of a kind that it cannot leave anything in."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype))
