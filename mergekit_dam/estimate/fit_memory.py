"""The memory of the fit of one part: its weights, moments and solutions."""

from collections.abc import Iterator

import torch

from mergekit_dam.estimate.flops import linear_size
from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.memory import (
    LOGITS,
    Need,
    Room,
    chunk_bytes,
    held_bytes,
    kept_at,
    kept_by_place,
    needs_copies,
    output_cache_bytes,
    outputs_place,
    sources_stay,
    stays,
    stream_bytes,
    with_article,
    with_streams,
)
from mergekit_dam.estimate.sizes import PartSize
from mergekit_dam.estimate.structure import Group
from mergekit_dam.fitting.embedding import ROWS
from mergekit_dam.fitting.memory import (
    apart_bytes,
    correction_bytes,
    factor_bytes,
    gathering_bytes,
    moments_bytes,
    solution_bytes,
)
from mergekit_dam.fitting.sizes import DOUBLE, FLOAT, MetricSize
from mergekit_dam.model.part import runs_as_stored


def fit_need(part: PartSize, inventory: Inventory, room: Room, *, metrics: bool) -> Need:
    """The fit of one part, without streams and without what stays in memory between parts.

    Args:
        metrics: errors of a block's linears are measured in metrics.
    """
    if part.kind == "block":
        return _block_need(part, inventory, room, metrics=metrics)
    weights = FLOAT * part.parameters
    copies = weights if needs_copies(part) else 0
    need = Need(f"fit of {with_article(part)}").plus(
        device=weights + held_bytes(part, inventory, room)
    )
    if part.kind == "output":
        return need.plus(device=_head_bytes(part, inventory))
    rows = 2 * DOUBLE * part.unknowns * ROWS * inventory.hidden
    # A teacher runs; or rows are fitted; or the part is examined with its weights scattered.
    return need.plus(device=max(copies + chunk_bytes(part, inventory), rows, weights))


def _block_need(part: PartSize, inventory: Inventory, room: Room, *, metrics: bool) -> Need:
    """The fit of a block."""
    merged, copies = _running_bytes(part, inventory, room)
    cached = output_cache_bytes(part, inventory, room)
    held = held_bytes(part, inventory, room)
    made, rows, experts = _metric_bytes(part, inventory) if metrics else (0, 0, 0)
    stay = stays(made, room)
    solving, on_host = _solving_bytes(
        part, inventory, room, copies=0 if cached else copies, metrics=metrics, stay=stay
    )
    at_a_time = made if stay else made // inventory.text.models  # while those of a model are made
    making = at_a_time + rows + FLOAT * part.parameters if metrics else 0
    solving += made if stay else 0
    # On a CPU, chunks and gradients are in pieces so small that the process keeps what it had.
    chunk = chunk_bytes(part, inventory)
    running = max(making, copies) + (chunk if room.gpu else 0)
    need = Need(f"fit of {with_article(part)}").plus(
        device=merged + held + experts + max(running, solving) + (0 if room.gpu else chunk),
        host=on_host + (0 if stay else made) + _converted_on_host(part, inventory, room),
    )
    if part.of("experts"):  # what enters them in both models is kept as the streams are
        need = with_streams(need, 2 * stream_bytes(inventory), inventory, room)
    return kept_at(outputs_place(inventory, room), need, cached)


def _running_bytes(part: PartSize, inventory: Inventory, room: Room) -> tuple[int, int]:
    """Bytes on the device of a block's weights as it runs: merged ones, and one teacher's copies.

    Merged ones are there as they are written, too.
    """
    assert inventory.settings is not None
    dtype = inventory.settings.dtype_on(torch.device("cuda" if room.gpu else "cpu"))
    stay, merged, copies = sources_stay(part, room), 0, 0
    for tensor in part.tensors:
        wide = FLOAT * tensor.parameters
        merged += tensor.written + (
            0 if runs_as_stored(tensor.matrix, tensor.writes, dtype) else wide
        )
        if not all(runs_as_stored(tensor.matrix, loaded, dtype) for loaded in tensor.loads):
            copies += wide
        elif not stay:
            copies += tensor.parameters * max(loaded.itemsize for loaded in tensor.loads)
    return merged, copies


def _converted_on_host(part: PartSize, inventory: Inventory, room: Room) -> int:
    """Bytes of an open part's sources on the host that are no mapped pages, nor kept anyway."""
    assert inventory.settings is not None
    kept = not inventory.settings.one_sweep and kept_by_place(inventory, room)[1] > 0
    if sources_stay(part, room) or kept:
        return 0
    return sum(tensor.converted for tensor in part.tensors)


def _metric_bytes(part: PartSize, inventory: Inventory) -> tuple[int, int, int]:
    """Metrics of a block's linears for every model, gradients of one, and those of experts."""
    text = inventory.text
    tokens = text.gradient_tokens_each
    linears = part.of("linear", "router")
    metrics = text.models * sum(MetricSize(unit.leaves, tokens).bytes for unit in linears)
    rows = 2 * FLOAT * tokens * sum(unit.leaves for unit in linears)
    # Of experts, what enters all of them and the gradient of what leaves them are kept.
    experts = FLOAT * 2 * len(part.of("experts")) * inventory.hidden * text.gradient_tokens
    return metrics, rows, experts


def _solving_bytes(
    part: PartSize, inventory: Inventory, room: Room, *, copies: int, metrics: bool, stay: bool
) -> tuple[int, int]:
    """The most on the device, and on the host, that one group's moments and solutions take.

    On the device, the tokens that judge are counted, and metrics if they are copied there.

    Args:
        copies: bytes of a teacher's weights while moments are gathered, if it runs then.
        stay: whether metrics stay on the device.
    """
    text, found, on_host = inventory.text, [0], [0]
    tokens = text.gradient_tokens_each if metrics else 0
    for group in _solved_together(part):
        sizes = [linear_size(unit, part, inventory, gradient_tokens=tokens) for unit in group]
        # Of the tokens that judge, targets are as kept in the cache; what enters is a copy.
        beside = FLOAT * text.tensor_judging_tokens * (group[0].enters + group[0].leaves)
        if not stay:
            beside += sum(text.models * size.metric.bytes for size in sizes if size.metric)
        apart = apart_bytes(sizes)
        host = not stays(apart, room)
        on_host.append(apart if host else 0)
        two = stays(factor_bytes(sizes[0]), room)
        solving = max(
            max(
                solution_bytes(size, on_host=host),
                correction_bytes(size, on_host=host, two=two),
            )
            for size in sizes
        )
        gathering = gathering_bytes(sizes, on_host=host) + copies
        gathering += chunk_bytes(part, inventory) if room.gpu else 0
        found.append(beside + max(gathering, moments_bytes(sizes, on_host=host) + solving))
    return max(found), max(on_host)


def _solved_together(part: PartSize) -> Iterator[Group]:
    """Linears that share a Gram matrix; of experts, one linear of one expert."""
    for group in part.groups:
        if group[0].kind in ("linear", "router"):
            yield group
        for linear in group[0].linears:
            yield (linear,)


def _head_bytes(part: PartSize, inventory: Inventory) -> int:
    """Bytes of a head's descent: weights, gradients, their successors, one sequence's logits."""
    if not part.fits_head:
        return 0
    weight = FLOAT * sum(unit.parameters for unit in part.of("head"))
    logits = LOGITS * FLOAT * inventory.text.length * inventory.vocabulary
    copied = needs_copies(part)
    return max(weight * (4 if copied else 3) + (weight // 2 if copied else 0), 4 * weight + logits)
