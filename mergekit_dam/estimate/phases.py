"""The phases of a merge, each with the most memory that it takes at a time."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from mergekit_dam.estimate.fit_memory import fit_need
from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.memory import (
    LOGITS,
    Need,
    Room,
    chunk_bytes,
    held_bytes,
    kept_by_place,
    loaded_bytes,
    needs_copies,
    stream_bytes,
    with_article,
    with_streams,
)
from mergekit_dam.estimate.sizes import PartSize, TensorSize
from mergekit_dam.estimate.structure import Group
from mergekit_dam.estimate.sweeps import WRITING
from mergekit_dam.fitting.sizes import DOUBLE, FLOAT
from mergekit_dam.streams import storage


def phases(inventory: Inventory, room: Room) -> list[Need]:
    """Every phase of a merge, with all that is held meanwhile."""
    written = sum(tensor.written for tensor in inventory.tensors)
    shard = min(written, room.shard) if room.shard > 0 else written
    mapped = room.libraries + sum(max(files, default=0) for files in inventory.files)
    settings = inventory.settings
    needs: list[Need] = []
    if settings is not None and settings.one_sweep:
        needs = [need.plus(host=shard, mapped=mapped) for need in _one_sweep(inventory, room)]
    elif settings is not None:
        on_gpu, on_host = kept_by_place(inventory, room)
        kept = on_gpu + on_host
        converted = sum(t.converted for part in inventory.parts for t in part.tensors)
        every = room.libraries + sum(sum(files) for files in inventory.files)
        held = every if kept else mapped
        on_device = on_gpu if room.gpu else on_host
        searched = _search(inventory, room, kept=on_device / max(1, loaded_bytes(inventory)))
        host = min(on_host, converted)
        needs = [need.plus(device=on_gpu, host=host, mapped=held) for need in searched]
    largest = max(inventory.tensors, key=lambda tensor: tensor.parameters)
    merging = largest.converted + 2 * FLOAT * largest.parameters
    needs.append(Need("merging and writing", device=merging, host=shard, mapped=mapped))
    written_text = _writing(inventory, room, mapped)
    return [need.plus(host=room.baseline) for need in (*written_text, *needs)]


def _writing(inventory: Inventory, room: Room, mapped: int) -> Iterator[Need]:
    """The largest model that writes its own text, which is in memory as a whole."""
    settings = inventory.settings
    if settings is not None and inventory.writing:
        dtype = settings.dtype_on(torch.device("cuda" if room.gpu else "cpu"))
        whole = max(writing.bytes(dtype) for writing in inventory.writing)
        yield Need(WRITING, device=whole, mapped=mapped)


def _one_sweep(inventory: Inventory, room: Room) -> Iterator[Need]:
    """The fit of every part, with the streams."""
    for part in _distinct(inventory):
        need = fit_need(part, inventory, room, metrics=False)
        yield with_streams(need, _moving_bytes(inventory), inventory, room)


def _search(inventory: Inventory, room: Room, *, kept: float) -> Iterator[Need]:
    """The phases of a search, with the streams.

    Args:
        kept: share of the weights that stays on the device between sweeps.
    """
    settings = inventory.settings
    assert settings is not None
    one, fits = stream_bytes(inventory), _distinct(inventory)
    if settings.objective == "logits":
        yield with_streams(judge_need(inventory, room), 2 * one, inventory, room)
    else:
        metrics = settings.metric == "sensitivity"
        tokens = inventory.text.judging_tokens + metrics * inventory.text.gradient_tokens
        surveyed = storage.stream_bytes(inventory.hidden, tokens)
        for part in fits:
            need = fit_need(part, inventory, room, metrics=metrics)
            yield with_streams(need, surveyed + _moving_bytes(inventory), inventory, room)
        yield with_streams(judge_need(inventory, room), 4 * one, inventory, room)
        for part in fits if metrics else ():
            if part.kind != "input":
                need = backward_need(part, inventory, room, weights_too=False)
                yield with_streams(need, 3 * one, inventory, room)
    if settings.objective != "layer":
        merged = int(kept * FLOAT * sum(part.parameters for part in inventory.parts))
        unknowns = sum(u.enters * p.unknowns for p in inventory.parts for u in p.units)
        for part in fits:
            need = backward_need(part, inventory, room, weights_too=True)
            need = replace(need, phase=f"descent: {need.phase}")
            need = need.plus(device=merged + 4 * DOUBLE * unknowns, mapped=inventory.moving)
            yield with_streams(need, 2 * one, inventory, room)


def judge_need(inventory: Inventory, room: Room) -> Need:
    """The judgement of the whole model: output parts of all models, and one sequence's logits."""
    part = inventory.parts[-1]
    weights = FLOAT * part.parameters
    copies = weights if needs_copies(part) else 0  # of one model at a time
    logits = LOGITS * FLOAT * inventory.text.length * inventory.vocabulary
    loaded = held_bytes(part, inventory, room)
    return Need("judgement of the whole model", device=loaded + weights + copies + logits)


def backward_need(part: PartSize, inventory: Inventory, room: Room, *, weights_too: bool) -> Need:
    """A run of a part on one chunk, forward and back.

    Args:
        weights_too: weights have gradients, not only what entered the part.
    """
    weights = FLOAT * part.parameters
    logits = LOGITS * FLOAT * inventory.text.length * inventory.vocabulary
    inner = logits if part.kind == "output" else 2 * chunk_bytes(part, inventory)
    loaded = held_bytes(part, inventory, room)
    return Need(
        f"backward through {with_article(part)}",
        device=loaded + weights * (3 if weights_too else 2) + inner,
    )


def _moving_bytes(inventory: Inventory) -> int:
    """Streams of a sweep of layer fits: both, and what leaves the part for one, then another."""
    one = stream_bytes(inventory)
    return 3 * one + one // max(1, inventory.text.models)


def _distinct(inventory: Inventory) -> list[PartSize]:
    """Parts that differ in more than the names of their tensors."""
    found: dict[tuple[str, tuple[Group, ...], tuple[TensorSize, ...]], PartSize] = {}
    for part in inventory.parts:
        sizes = tuple(replace(tensor, name="") for tensor in part.tensors)
        found.setdefault((part.kind, part.groups, sizes), part)
    return list(found.values())
