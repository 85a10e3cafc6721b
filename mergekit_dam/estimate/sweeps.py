"""The way of a merge through its models: what each sweep reads, computes and writes."""

from dataclasses import dataclass

from mergekit_dam.estimate import flops
from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.memory import Room, kept_weights, output_cache_bytes
from mergekit_dam.search.search import DESCENTS


@dataclass(frozen=True)
class Sweep:
    """One or more goes through the models' parts, with one purpose.

    Attributes:
        read: bytes of the models' files that it asks for.
        work: what it computes.
        condition: when it is gone through; empty where always.
    """

    name: str
    read: int
    work: flops.Work
    write: int = 0
    condition: str = ""

    @property
    def certain(self) -> bool:
        """Whether it is always gone through."""
        return not self.condition


def sweeps(inventory: Inventory, room: Room) -> list[Sweep]:
    """All sweeps of a merge, in order.

    The second layer sweep and the descents after the first may never come: they are not certain.
    """
    every = sum(tensor.stored for tensor in inventory.tensors)
    written = sum(tensor.written for tensor in inventory.tensors)
    last = Sweep("merge and write", every, flops.written(inventory), written)
    settings = inventory.settings
    if settings is None:
        return [last]
    taped = all(output_cache_bytes(part, inventory, room) != (0, 0) for part in inventory.blocks)
    if settings.one_sweep:
        work = flops.layer_sweep(inventory, kept=taped, sensitivity=False)
        return [Sweep("fit and write", every, work, written)]
    stages = _stored(inventory, 0)
    # What stays in memory after the first sweep is not read again.
    fraction = 1 - kept_weights(inventory, room) / max(1, _loaded(inventory))
    again = int(fraction * stages)
    found = [Sweep("survey", stages, flops.survey(inventory))]
    if settings.objective != "logits":
        if settings.metric == "sensitivity":
            back = int(fraction * _stored(inventory, 1))
            found.append(Sweep("backward", back, flops.backward_sweep(inventory)))
        for sensitivity in (True, False) if settings.metric == "sensitivity" else (False,):
            work = flops.layer_sweep(inventory, kept=taped, sensitivity=sensitivity)
            work += flops.judgement(inventory)
            name = f"layer fits, {'sensitivity' if sensitivity else 'identity'}"
            first = sensitivity == (settings.metric == "sensitivity")
            condition = "" if first else "if those are no good"
            found.append(Sweep(name, again, work, condition=condition))
    if settings.objective != "layer":
        asked = settings.steps
        for index, steps in enumerate(DESCENTS if asked is None else (asked,)):
            looks = flops.looks(steps)
            goes = 2 * steps * settings.gradient_accumulation + looks
            work = flops.descent(inventory, settings, steps)
            name = f"descent, {steps} steps"
            condition = "if that pays" if index else ""
            found.append(Sweep(name, goes * again, work, condition=condition))
    return [*found, last]


def _stored(inventory: Inventory, first: int) -> int:
    parts = inventory.parts[first:]
    return sum(tensor.stored for part in parts for tensor in part.tensors)


def _loaded(inventory: Inventory) -> int:
    return sum(tensor.loaded for part in inventory.parts for tensor in part.tensors)
