"""The memory of a merge: hidden states and weights that are kept.

Bytes are counted where they are: on the device that fits, on the host, or as pages of files that
are mapped into memory (weights as they are stored), which the system takes back when it must.
On a CPU, device and host are one memory. Where something is kept is decided by the fit's own rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_dam.estimate.flops import leaving
from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.sizes import PartSize
from mergekit_dam.fitting.sizes import FLOAT
from mergekit_dam.layers.state import RECORDED
from mergekit_dam.sources.network import has_room as has_room_for_weights
from mergekit_dam.streams import storage
from mergekit_dam.streams.outputs import cache_bytes, kept_dtype
from mergekit_dam.streams.storage import Location, may_stay
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


def stays(size: int, room: Room) -> bool:
    """Whether tensors are on the device between their uses; a CPU has no other place."""
    return not room.gpu or may_stay(size, room.gpu)


def sources_stay(part: PartSize, room: Room) -> bool:
    """Whether a part's tensors of all sources are on the device while it is open."""
    loaded = sum(tensor.loaded for tensor in part.tensors)
    return part.kind != "block" or stays(loaded, room)


def held_bytes(part: PartSize, inventory: Inventory, room: Room) -> int:
    """Bytes on the device of the sources' tensors of an open part: those that are no mapped pages.

    Where they are on the host, it is those of one tensor at a time. Where all weights that have a
    place on the GPU are kept there between sweeps, they are counted with those.
    """
    if not room.gpu:
        return sum(tensor.converted for tensor in part.tensors)
    sizes = [tensor.loaded for tensor in part.tensors]
    if not sources_stay(part, room):
        return max(sizes, default=0)
    every = sum(t.loaded for p in inventory.parts if sources_stay(p, room) for t in p.tensors)
    assert inventory.settings is not None
    resident = 0 if inventory.settings.one_sweep else kept_by_place(inventory, room)[0]
    return 0 if resident == every else sum(sizes)


def loaded_bytes(inventory: Inventory) -> int:
    """Bytes of all parts' tensors, of all sources, as they are loaded."""
    return sum(tensor.loaded for part in inventory.parts for tensor in part.tensors)


def kept_weights(inventory: Inventory, room: Room) -> int:
    """Bytes of the sources that stay in memory between sweeps, pages of files included."""
    return sum(kept_by_place(inventory, room))


def kept_by_place(inventory: Inventory, room: Room) -> tuple[int, int]:
    """The same by place: on the GPU, and on the host."""
    here, there = (
        [
            sum(tensor.loaded for tensor in part.tensors)
            for part in inventory.parts
            if (room.gpu > 0 and sources_stay(part, room)) == on_gpu
        ]
        for on_gpu in (True, False)
    )
    assert inventory.settings is not None
    if inventory.settings.resident == "always":
        return sum(here), sum(there)
    if inventory.settings.resident == "never":
        return 0, 0
    on_gpu = _kept(here, room.gpu)
    if any(t.converted for part in inventory.parts for t in part.tensors):
        return on_gpu, _kept(there, room.host)
    # Pages of files leave as much memory available as before, until there are too many.
    return on_gpu, sum(there) if sum(there) <= room.host else 0


def _kept(sizes: Sequence[int], whole: int) -> int:
    kept = 0
    for size in sizes:
        if has_room_for_weights(whole - kept - size, whole, size):
            kept += size
    return kept


def with_streams(need: Need, size: int, inventory: Inventory, room: Room) -> Need:
    """A phase with `size` bytes of hidden states where streams are kept."""
    return kept_at(stream_place(inventory, room), need, size)


def kept_at(location: Location, need: Need, size: int) -> Need:
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
