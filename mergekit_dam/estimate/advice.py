"""Sentences about what would not fit, with the parameters to change."""

from collections.abc import Iterator, Sequence

from mergekit_dam.estimate.disk import disk_bytes
from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.machine import Machine
from mergekit_dam.estimate.memory import Need, Room, stream_bytes, stream_place
from mergekit_dam.estimate.sweeps import WRITING


def problems(
    inventory: Inventory, machine: Machine, room: Room, needs: Sequence[Need]
) -> Iterator[str]:
    """One sentence for each thing that would not fit.

    Args:
        needs: memory by phase.
    """
    own = {need.phase: need.host + (0 if room.gpu else need.device) for need in needs}
    phase = max(own, key=lambda name: own[name])
    if own[phase] > machine.memory:
        yield (
            f"host memory: {phase} takes {_gb(own[phase])}, the machine has "
            f"{_gb(machine.memory)}; {_remedy(inventory, room, phase, 'host')}"
        )
    elif own[phase] > machine.available:
        yield (
            f"host memory: {phase} takes {_gb(own[phase])}, of which {_gb(machine.available)} are "
            f"free at the moment; end other programs, or {_remedy(inventory, room, phase, 'host')}"
        )
    most = max(needs, key=lambda need: need.device)
    if room.gpu and most.device > room.gpu:
        yield (
            f"GPU memory: {most.phase} takes {_gb(most.device)}, and the merge may use "
            f"{_gb(room.gpu)}; "
            f"{_remedy(inventory, room, most.phase, 'device')}"
        )
    written = sum(tensor.written for tensor in inventory.tensors) + inventory.corrections
    files = written + disk_bytes(inventory, room)
    if files > machine.disk:
        yield (
            f"disk: the merged model and temporary files take {_gb(files)}, {_gb(machine.disk)} "
            f"are free; choose another place for the output"
            + (", or lower `samples`" if inventory.settings is not None else "")
        )


def _remedy(inventory: Inventory, room: Room, phase: str, place: str) -> str:
    """The parameters to change for less memory in a phase."""
    settings = inventory.settings
    if settings is None or phase == "merging and writing":
        return "pass a smaller `--out-shard-size`"
    if phase == WRITING:
        return "name a source with text in place of `self`, or set `forward_dtype: bfloat16`"
    found = []
    converted = any(tensor.converted for tensor in inventory.tensors)
    if settings.resident != "never" and not settings.one_sweep and (converted or room.gpu):
        found.append("set `resident: never`")
    if stream_place(inventory, room) == place and stream_bytes(inventory):
        further = "host" if place == "device" else "disk"
        found.append(f"set `stream_offload: {further}`")
        found.append("lower `samples` or `sequence_length`")
    if "output" in phase or "judgement" in phase:
        found.append("lower `sequence_length`, or set `head: false`")
    if settings.metric == "sensitivity" and settings.objective != "logits":
        found.append("set `metric: identity`")
    if settings.objective != "layer":
        found.append("set `objective: layer`")
    if place == "host" and settings.one_sweep:
        found.append("pass a smaller `--out-shard-size`")
    if place == "device":
        found.append("merge on the CPU")
    return ", or ".join(dict.fromkeys(found))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
