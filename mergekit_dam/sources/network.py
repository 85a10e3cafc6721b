"""The model as a chain of stages, whose weights are read again in every sweep.

A sweep goes through the stages in order, or in reverse, and holds one of them at a time.
Weights that fit in memory stay there between sweeps (`resident`); the results are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mergekit_dam.choices import Resident
from mergekit_dam.sources.finite import require_finite
from mergekit_dam.sources.readahead import Span, read_ahead
from mergekit_dam.sources.stage import Loaded, OpenStage, Stage, open_stage, placed
from mergekit_dam.streams.memory import free_memory_of, give_back, memory_of

SPARE = 0.5
"""Fraction of the memory that weights kept between sweeps must leave free."""

FIT = 12
"""Memory that they must leave free for the fit of a stage, in weights of that stage of all sources:
moments, metrics and solutions take about that, more of it on a small GPU than the half."""


@dataclass
class Network:
    """The stages of a model, in the order in which data passes them.

    Attributes:
        stages: Input, blocks, output.
        load: Function that reads a stage's tensors, of all sources.
        spans: Function that returns the byte ranges of a stage's tensors in their files.
        device: Device on which parts run.
        resident: Whether weights stay in memory between sweeps.
    """

    stages: Sequence[Stage]
    load: Callable[[int], Loaded]
    spans: Callable[[int], tuple[Span, ...]]
    device: torch.device
    resident: Resident = "auto"
    _kept: dict[int, Loaded] = field(default_factory=dict)
    _last: OpenStage | None = None

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of the output tensors of all stages."""
        return frozenset(spec.name for stage in self.stages for spec in stage.tensors)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weight of each source's data in the loss of the whole model."""
        return self.stages[0].tensors[0].settings.loss_weights

    @property
    def tied(self) -> dict[str, str]:
        """Output tensors that are the same parameter as another one: name -> name of the other."""
        specs = (spec for stage in self.stages for spec in stage.tensors)
        return {spec.name: spec.tied_to for spec in specs if spec.tied_to is not None}

    def open(self, number: int, *, then: int | None = None) -> OpenStage:
        """A stage with its weights, read from the models' shards unless they are in memory.

        It stays open until the next stage is opened.

        Args:
            then: Index of the stage that the sweep opens next; its weights are read ahead.
        """
        if self._last is not None:
            self._last.close()
            give_back()
        loaded = self._kept.get(number)
        if loaded is None:
            loaded = placed(self.stages[number], self.load(number), self.device)
            require_finite(loaded)
            if self.resident == "always" or (self.resident == "auto" and self._has_room(loaded)):
                self._kept[number] = loaded
        if then is not None and then not in self._kept:
            read_ahead(self.spans(then))
        self._last = open_stage(self.stages[number], loaded, self.device)
        return self._last

    def all(self, first: int = 0) -> Iterator[tuple[int, OpenStage]]:
        """All stages in order, one at a time, or those from the first on that is asked for."""
        yield from self.forward(first)
        if first <= self._last_number:
            yield self._last_number, self.output()

    def forward(self, first: int = 0) -> Iterator[tuple[int, OpenStage]]:
        """Input and blocks in order, one at a time; the caller opens the output if it needs it."""
        for number in range(first, self._last_number):
            yield number, self.open(number, then=number + 1)

    def backward(self) -> Iterator[tuple[int, OpenStage]]:
        """Blocks in reverse order, one at a time."""
        for number in range(self._last_number - 1, 0, -1):
            yield number, self.open(number, then=number - 1)

    def output(self) -> OpenStage:
        """The last stage."""
        return self.open(self._last_number)

    def _has_room(self, loaded: Loaded) -> bool:
        tensors = [tensor for own in loaded.values() for tensor in own.values()]
        device = tensors[0].device if tensors else self.device
        size = sum(tensor.nbytes for tensor in tensors)
        return has_room(free_memory_of(device), memory_of(device), size)

    @property
    def _last_number(self) -> int:
        return len(self.stages) - 1

    def keeps_on_device(self, number: int) -> bool:
        """Whether a stage's weights stay on the device between sweeps."""
        kept = self._kept.get(number, {})
        return any(
            own.device.type == self.device.type for by in kept.values() for own in by.values()
        )

    def release(self) -> None:
        """Release all weights."""
        self._kept.clear()
        if self._last is not None:
            self._last.close()


def has_room(free: int, whole: int, size: int) -> bool:
    """Whether weights that have just been read may stay in memory for the next sweep.

    Args:
        free: bytes of the device's memory that are free with these weights in it.
        whole: bytes of the device's memory.
        size: bytes of these weights.
    """
    return free > max(SPARE * whole, FIT * size)
