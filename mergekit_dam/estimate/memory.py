"""The memory of a merge: hidden states and weights that are kept, and the fit of one part.

Bytes are counted where they are: on the device that fits, on the host, or as pages of files that
are mapped into memory (weights as they are stored), which the system takes back when it must.
On a CPU, device and host are one memory. Where something is kept is decided by the fit's own rules.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mergekit_dam.estimate.flops import leaving, linear_size
from mergekit_dam.estimate.inventory import Inventory, PartSize
from mergekit_dam.estimate.structure import Group
from mergekit_dam.fitting.costs import (
    DOUBLE,
    FLOAT,
    MetricSize,
    correction_bytes,
    gathering_bytes,
    moments_bytes,
    solution_bytes,
)
from mergekit_dam.fitting.embedding import ROWS
from mergekit_dam.layers.state import RECORDED
from mergekit_dam.sources.network import has_room as has_room_for_weights
from mergekit_dam.streams import storage
from mergekit_dam.streams.outputs import cache_bytes, kept_dtype
from mergekit_dam.streams.storage import Location
from mergekit_dam.streams.stream import chunk_sequences

LOGITS = 7
"""Tensors as large as one sequence's logits that a loss and its gradient hold at a time."""
_LIVE = 2
"""Copies of a part's outputs of units that a run of one chunk holds at a time, about."""


@dataclass(frozen=True)
class Need:
    """The bytes that one phase of a merge takes at its peak.

    Attributes:
        device: bytes on the device that fits.
        host: bytes on the host.
        mapped: bytes of mapped files.
    """

    phase: str
    device: int = 0
    host: int = 0
    mapped: int = 0

    def plus(self, *, device: int = 0, host: int = 0, mapped: int = 0) -> "Need":
        """The same phase with more."""
        return replace(
            self,
            device=self.device + device,
            host=self.host + host,
            mapped=self.mapped + mapped,
        )


@dataclass(frozen=True)
class Room:
    """The memory of the machine that a merge runs on, and what of it is taken from the start.

    Attributes:
        host: bytes of the host's memory.
        gpu: bytes of the GPU; 0 without one.
        disk: bytes that are free where the merged model goes.
        baseline: bytes of the process's own memory before it reads a weight.
        libraries: bytes of files that are mapped by then.
        shard: bytes that the writer collects before it writes.
    """

    host: int
    gpu: int
    disk: int
    baseline: int
    libraries: int
    shard: int

    @property
    def device(self) -> int:
        """Bytes of the memory of the device that fits."""
        return self.gpu or self.host

    def of(self, location: Location) -> int:
        """Bytes of one place where hidden states may be kept."""
        return {"device": self.device, "host": self.host, "disk": self.disk}[location]


def stream_bytes(inventory: Inventory) -> int:
    """Bytes of the hidden states of all models' calibration text in one stream."""
    return storage.stream_bytes(inventory.hidden, inventory.text.tokens)


def stream_place(inventory: Inventory, room: Room) -> Location:
    """Where streams are kept."""
    assert inventory.settings is not None
    size = storage.streams_bytes(inventory.hidden, inventory.text.tokens)
    return storage.stream_location(
        inventory.settings.stream_offload, size, gpu=room.gpu, host=room.host
    )


def outputs_place(inventory: Inventory, room: Room) -> Location:
    """Where outputs of units are kept, if there is room."""
    assert inventory.settings is not None
    return storage.outputs_location(inventory.settings.stream_offload, gpu=room.gpu > 0)


def output_cache_bytes(part: PartSize, inventory: Inventory, room: Room) -> int:
    """Bytes of the units' outputs that are kept while a part is fitted.

    It is 0 where there is no room for them: then outputs are computed again.
    """
    if part.kind != "block" or inventory.settings is None:
        return 0
    place = outputs_place(inventory, room)
    device = torch.device("cuda" if room.gpu else "cpu")
    linears = kept_dtype(inventory.settings.dtype_on(device), place).itemsize
    tokens = inventory.text.tokens
    sizes = {
        unit.name: tokens * unit.leaves * (linears if unit.kind == "linear" else FLOAT)
        for unit in part.of(*RECORDED)
    }
    size = cache_bytes(sizes, _lasting(part, inventory))
    return size if storage.has_room(size, room.of(place)) else 0


def _lasting(part: PartSize, inventory: Inventory) -> frozenset[str]:
    """Units whose teachers' outputs are needed until a part is done, as `Walk.lasting` says.

    What adds to the residual stream is a linear that has an input of its own, and is as wide.
    """
    if part.of("router", "experts"):
        return frozenset(unit.name for unit in part.units)
    alone = (group[0] for group in part.groups if len(group) == 1)
    return frozenset(u.name for u in alone if u.kind == "linear" and u.leaves == inventory.hidden)


def chunk_bytes(part: PartSize, inventory: Inventory) -> int:
    """Bytes that a run of one chunk of sequences holds."""
    length = inventory.text.length
    tokens = chunk_sequences(length) * length
    leaves = sum(leaving(unit) for unit in part.units if unit.kind != "head")
    return _LIVE * FLOAT * tokens * leaves


def fit_need(part: PartSize, inventory: Inventory, room: Room, *, metrics: bool) -> Need:
    """The fit of one part, without streams and without what stays in memory between parts.

    Args:
        metrics: errors of a block's linears are measured in metrics.
    """
    weights = FLOAT * part.parameters
    copies = weights if needs_copies(part) else 0
    need = Need(f"fit of {with_article(part)}").plus(
        device=weights + sum(tensor.converted for tensor in part.tensors)
    )
    if part.kind == "output":
        return need.plus(device=_head_bytes(part, inventory))
    if part.kind == "input":
        rows = 2 * DOUBLE * part.unknowns * ROWS * inventory.hidden
        # A teacher runs; or rows are fitted; or the part is examined with its weights scattered.
        return need.plus(device=max(copies + chunk_bytes(part, inventory), rows, weights))
    written = sum(tensor.written for tensor in part.tensors)
    cached = output_cache_bytes(part, inventory, room)
    solving = _solving_bytes(part, inventory, copies=0 if cached else copies, metrics=metrics)
    # Chunks and gradients are in pieces so small that the process keeps what it had of them.
    need = need.plus(device=chunk_bytes(part, inventory) + written)
    if metrics:
        made, rows = _metric_bytes(part, inventory)
        need = need.plus(device=made + max(rows + max(copies, weights), solving))
    else:
        need = need.plus(device=max(copies, solving))
    if part.of("experts"):  # what enters them in both models is kept as the streams are
        need = with_streams(need, 2 * stream_bytes(inventory), inventory, room)
    return _kept_at(outputs_place(inventory, room), need, cached)


def _metric_bytes(part: PartSize, inventory: Inventory) -> tuple[int, int]:
    """Metrics of a block's linears for every model, and the gradients that one model's are of."""
    text = inventory.text
    tokens = text.gradient_tokens_each
    linears = part.of("linear", "router")
    metrics = text.models * sum(MetricSize(unit.leaves, tokens).bytes for unit in linears)
    rows = 2 * FLOAT * tokens * sum(unit.leaves for unit in linears)
    # Of experts, what enters all of them and the gradient of what leaves them are kept.
    experts = FLOAT * 2 * len(part.of("experts")) * inventory.hidden * text.gradient_tokens
    return metrics + experts, rows


def _solving_bytes(part: PartSize, inventory: Inventory, *, copies: int, metrics: bool) -> int:
    """The most that moments of one group, tokens that judge it, and a solution take.

    Args:
        copies: bytes of a teacher's weights while moments are gathered, if it runs then.
    """
    text, found = inventory.text, [0]
    tokens = text.gradient_tokens_each if metrics else 0
    for group in _solved_together(part):
        sizes = [linear_size(unit, part, inventory, gradient_tokens=tokens) for unit in group]
        # Of the tokens that judge, targets are as kept in the cache; what enters is a copy.
        judging = FLOAT * text.tensor_judging_tokens * (group[0].enters + group[0].leaves)
        solving = max(max(solution_bytes(size), correction_bytes(size)) for size in sizes)
        phases = (gathering_bytes(sizes) + copies, moments_bytes(sizes) + solving)
        found.append(judging + max(phases))
    return max(found)


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


def loaded_bytes(inventory: Inventory) -> int:
    """Bytes of all parts' tensors, of all sources, as they are loaded."""
    return sum(tensor.loaded for part in inventory.parts for tensor in part.tensors)


def kept_weights(inventory: Inventory, room: Room) -> int:
    """Bytes of the sources that stay in memory between sweeps, pages of files included."""
    assert inventory.settings is not None
    loaded = [sum(tensor.loaded for tensor in part.tensors) for part in inventory.parts]
    if inventory.settings.resident == "always":
        return sum(loaded)
    if inventory.settings.resident == "never":
        return 0
    if not room.gpu and not any(t.converted for part in inventory.parts for t in part.tensors):
        # Pages of files leave as much memory available as before, until there are too many.
        return sum(loaded) if sum(loaded) <= room.host else 0
    kept = 0
    for size in loaded:
        if has_room_for_weights(room.device - kept - size, room.device, size):
            kept += size
    return kept


def with_streams(need: Need, size: int, inventory: Inventory, room: Room) -> Need:
    """A phase with `size` bytes of hidden states where streams are kept."""
    return _kept_at(stream_place(inventory, room), need, size)


def _kept_at(location: Location, need: Need, size: int) -> Need:
    """A phase with more bytes at a location; files are not memory."""
    if location == "device":
        return need.plus(device=size)
    return need.plus(host=size) if location == "host" else need


def needs_copies(part: PartSize) -> bool:
    """Whether running a part takes copies of its weights in fp32."""
    return any(tensor.half for tensor in part.tensors)


def with_article(part: PartSize) -> str:
    """A part for people."""
    return {"input": "the input", "block": "a block", "output": "the output"}[part.kind]
