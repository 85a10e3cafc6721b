"""The temporary files of a merge."""

from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.memory import (
    Room,
    output_cache_bytes,
    outputs_place,
    stream_bytes,
    stream_place,
)
from mergekit_dam.fitting.sizes import FLOAT
from mergekit_dam.streams.storage import boundary_bytes


def disk_bytes(inventory: Inventory, room: Room) -> int:
    """Bytes of hidden states, units' outputs and corrections in files while a merge runs.

    What is kept for a next run counts, too.
    """
    settings = inventory.settings
    if settings is None:
        return 0
    one = stream_bytes(inventory)
    count = inventory.corrections + kept_bytes(inventory)
    if inventory.moving:  # the corrections of the start, and those of the best point
        count += inventory.corrections + inventory.moving
    if stream_place(inventory, room) == "disk":
        count += (3 if settings.one_sweep else 5) * one
    if outputs_place(inventory, room) == "disk" and settings.objective != "logits":
        count += max(output_cache_bytes(part, inventory, room) for part in inventory.parts)
    depth = len(inventory.blocks)
    if settings.metric == "sensitivity" and settings.objective != "logits":
        count += 2 * depth * FLOAT * inventory.hidden * inventory.text.gradient_tokens
    elif settings.objective != "layer":
        tokens = inventory.text.batch_tokens(settings.batch_size)
        count += depth * FLOAT * inventory.hidden * tokens
    return count


def kept_bytes(inventory: Inventory) -> int:
    """Bytes of the states of a merge from which a next run continues, at the most.

    A state is written beside the one before. That of a descent has the factors and their moments,
    without the gradients.
    """
    settings = inventory.settings
    if settings is None or not settings.resume:
        return 0
    return boundary_bytes(inventory.hidden, inventory.text.tokens) + 2 * inventory.moving * 3 // 4
