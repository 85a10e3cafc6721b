"""The model as a chain of stages whose weights are read whenever a sweep comes by.

A sweep goes through the stages in order, or in reverse, and holds one of them at a time.
What fits in memory stays there between sweeps (`resident`); the numbers are the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from mergekit.graph import Executor, Task

from mergekit_dam.parameters import Resident
from mergekit_dam.sources.readahead import Span, read_ahead, spans_of
from mergekit_dam.sources.stage import Loaded, OpenStage, Stage, open_stage
from mergekit_dam.streams.memory import free_memory_of, give_back, memory_of

SPARE = 0.5
"""Part of the memory that stays free of weights kept between sweeps."""


@dataclass
class Network:
    """The stages of a model, in the order the data passes them.

    Attributes:
        stages: input, blocks, output.
        gathers: per stage, mergekit's tasks that bring each tensor of all sources.
        device: where parts run.
        resident: whether weights stay in memory between sweeps.
    """

    stages: Sequence[Stage]
    gathers: Sequence[Sequence[Task[Any]]]
    device: torch.device
    resident: Resident = "auto"
    _kept: dict[int, Loaded] = field(default_factory=dict)
    _last: OpenStage | None = None
    _at: int = -1

    @property
    def tensor_names(self) -> frozenset[str]:
        """Output tensors of all stages."""
        return frozenset(spec.name for stage in self.stages for spec in stage.tensors)

    @property
    def tied(self) -> dict[str, str]:
        """Output tensors that are the same parameter as another: name -> that one's name."""
        specs = (spec for stage in self.stages for spec in stage.tensors)
        return {spec.name: spec.tied_to for spec in specs if spec.tied_to is not None}

    @cached_property
    def _spans(self) -> list[tuple[Span, ...]]:
        """Where the weights of each stage lie."""
        return [spans_of(gathers) for gathers in self.gathers]

    def open(self, number: int) -> OpenStage:
        """A stage with its weights, read from the models' shards unless they are at hand.

        It stays open until the next one is. What the sweep will come to next is read ahead.
        """
        if self._last is not None:
            self._last.close()
            give_back()
        stage = self.stages[number]
        loaded = self._kept.get(number)
        if loaded is None:
            loaded = self._read(number)
            if self.resident == "always" or (self.resident == "auto" and _has_room(self.device)):
                self._kept[number] = loaded
        following = number + (1 if number > self._at else -1)
        if 0 <= following < len(self.stages) and following not in self._kept:
            read_ahead(self._spans[following])
        self._at, self._last = number, open_stage(stage, loaded, self.device)
        return self._last

    def forward(self) -> Iterator[tuple[int, OpenStage]]:
        """Input and blocks in order, one at a time; the output is opened by whoever needs it."""
        for number in range(len(self.stages) - 1):
            yield number, self.open(number)

    def backward(self) -> Iterator[tuple[int, OpenStage]]:
        """Blocks in reverse order, one at a time."""
        for number in range(len(self.stages) - 2, 0, -1):
            yield number, self.open(number)

    def output(self) -> OpenStage:
        """The last stage."""
        return self.open(len(self.stages) - 1)

    def keeps(self, number: int) -> bool:
        """Whether a stage's weights stay in memory between sweeps."""
        return number in self._kept

    def release(self) -> None:
        """Let go of all weights."""
        self._kept.clear()
        if self._last is not None:
            self._last.close()

    def _read(self, number: int) -> Loaded:
        tasks = list(self.gathers[number])
        specs = self.stages[number].all_tensors
        found = dict(Executor(tasks).run(quiet=True)) if tasks else {}
        return {
            spec.name: {model: tensor.to(self.device) for model, tensor in found[task].items()}
            for spec, task in zip(specs, tasks, strict=True)
        }


def _has_room(device: torch.device) -> bool:
    return free_memory_of(device) > SPARE * memory_of(device)
