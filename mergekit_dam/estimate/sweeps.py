"""The sweeps of a merge through its models: what each of them reads, computes and writes."""

from dataclasses import dataclass

from mergekit_dam.estimate import flops, search
from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.memory import Room, kept_weights, loaded_bytes, output_cache_bytes
from mergekit_dam.fitting.costs import Work
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.descents import ENOUGH, descents

WRITING = "text of the models' own"
"""The name of the sweep and of the phase in which models write their calibration text."""


@dataclass(frozen=True)
class Sweep:
    """One or more passes through the models' parts, with one purpose.

    Attributes:
        read: bytes that are read of the models' files.
        work: flops and elements.
        write: bytes that are written.
        condition: the condition under which the sweep is run; empty if it is always run.
        steps: number of steps of a descent; 0 of other sweeps.
    """

    name: str
    read: int
    work: Work
    write: int = 0
    condition: str = ""
    steps: int = 0

    @property
    def certain(self) -> bool:
        """Whether the sweep is always run."""
        return not self.condition


def sweeps(inventory: Inventory, room: Room) -> list[Sweep]:
    """All sweeps of a merge, in order: models write their own text, if they do; then the fit."""
    return [*_writing(inventory), *_fitting(inventory, room)]


def _fitting(inventory: Inventory, room: Room) -> list[Sweep]:
    """The sweeps of the fit and of the writer, as `search.search` runs them.

    The second layer sweep and the descents after the first are not certain to be run.
    """
    every = sum(tensor.stored for tensor in inventory.tensors)
    written = sum(tensor.written for tensor in inventory.tensors) + inventory.corrections
    last = Sweep("merge and write", every, search.written(inventory), written)
    settings = inventory.settings
    if settings is None:
        return [last]
    kept = all(output_cache_bytes(part, inventory, room) for part in inventory.blocks)
    if settings.one_sweep:
        work = flops.layer_sweep(inventory, kept=kept, sensitivity=False)
        return [Sweep("fit and write", every, work, written)]
    stages = _stored(inventory, 0)
    # What stays in memory after the first sweep is not read again.
    fraction = 1 - kept_weights(inventory, room) / max(1, loaded_bytes(inventory))
    again = int(fraction * stages)
    layers = settings.objective != "logits"
    measures = layers and settings.metric == "sensitivity"
    first = search.survey(inventory, measures=measures, teachers=not layers)
    found = [Sweep("survey", stages, first)]
    if layers:
        if measures:
            back = int(fraction * _stored(inventory, 1))
            found.append(Sweep("backward", back, search.backward_sweep(inventory)))
        for sensitivity in (True, False) if measures else (False,):
            work = flops.layer_sweep(inventory, kept=kept, sensitivity=sensitivity)
            work += search.judgement(inventory)
            name = f"layer fits, {'sensitivity' if sensitivity else 'identity'}"
            condition = "" if sensitivity == measures else "if those are no good"
            found.append(Sweep(name, again, work, condition=condition))
    if settings.objective != "layer":
        for index, steps in enumerate(descents(settings.steps)):
            looks = search.looks(steps)
            goes = 2 * steps * settings.gradient_accumulation + looks
            work = search.descent(inventory, settings, steps)
            name = f"descent, {steps} steps"
            condition = "if that pays" if index else _condition(settings)
            found.append(Sweep(name, goes * again, work, condition=condition, steps=steps))
    return [*found, last]


def _writing(inventory: Inventory) -> list[Sweep]:
    """The calibration text that models write themselves, if any do.

    A step that adds a token to a few documents waits for the weights to pass, not for products.
    """
    if not inventory.writing:
        return []
    work = Work()
    for writing in inventory.writing:
        work["writing", "forward"] += 2 * writing.parameters * writing.tokens
        work["writing", "elements"] += writing.parameters * writing.steps
    stored = sum(tensor.stored for tensor in inventory.tensors) // inventory.sources
    return [Sweep(WRITING, stored * len(inventory.writing), work)]


def _condition(settings: RunParameters) -> str:
    """The condition of the first descent."""
    if settings.objective == "logits" or settings.steps is not None:
        return ""
    return f"if {ENOUGH:.0%} of the KL are left"


def _stored(inventory: Inventory, first: int) -> int:
    parts = inventory.parts[first:]
    return sum(tensor.stored for part in parts for tensor in part.tensors)
