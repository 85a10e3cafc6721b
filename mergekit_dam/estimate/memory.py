"""The most memory that each phase of a merge takes at a time.

Bytes are counted where they are: on the device that fits, on the host, or as pages of files that
are mapped into memory (weights as they are stored), which the system takes back when it must.
On a CPU, device and host are one memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mergekit_dam.estimate.flops import leaving
from mergekit_dam.estimate.inventory import Inventory, PartSize, TensorSize
from mergekit_dam.estimate.structure import Group, UnitShape
from mergekit_dam.fitting.embedding import ROWS
from mergekit_dam.fitting.solver import DENSE_LIMIT, precision
from mergekit_dam.search.sensitivity import TOKENS
from mergekit_dam.sources.network import SPARE
from mergekit_dam.streams.storage import SHARE, Location
from mergekit_dam.streams.stream import CHUNK_TOKENS

_FLOAT = 4
_DOUBLE = 8
_LOGITS = 7
"""Tensors as large as one sequence's logits that a loss and its gradient hold at a time."""
_LIVE = 2
"""Times what the units of a part put out that a run of it holds for one chunk, about."""


@dataclass(frozen=True)
class Need:
    """What one phase takes at its peak, in bytes."""

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
    """Where a merge runs.

    Attributes:
        host, gpu: bytes there are; no accelerator if 0.
        disk: bytes that are free where the merged model goes.
        baseline: bytes of the process's own before it reads a weight.
        libraries: bytes of mapped files by then.
        shard: bytes that the writer collects before it writes.
    """

    host: int
    gpu: int
    disk: int
    baseline: int
    libraries: int
    shard: int


def stream_bytes(inventory: Inventory) -> int:
    """Of one stream of all models: hidden states fp32."""
    return _FLOAT * inventory.hidden * inventory.text.tokens


def stream_place(inventory: Inventory, room: Room) -> Location:
    """Where streams are kept; as `choose_storage` does."""
    assert inventory.settings is not None
    asked = inventory.settings.stream_offload
    if asked != "auto":
        return asked
    size = 3 * stream_bytes(inventory)
    if size <= SHARE * room.gpu:
        return "device"
    return "host" if size <= SHARE * room.host else "disk"


def outputs_place(inventory: Inventory, room: Room) -> Location:
    """Where outputs of units are kept; as `choose_storage` does."""
    assert inventory.settings is not None
    asked = inventory.settings.stream_offload
    if asked != "auto":
        return asked
    return "device" if room.gpu else "disk"


def output_cache_bytes(part: PartSize, inventory: Inventory, room: Room) -> tuple[int, int]:
    """Outputs of a part's units that are kept while it is fitted: the teachers', the merged ones'.

    Nothing where there is no room for them: they are computed again.
    """
    if part.kind != "block" or inventory.settings is None:
        return 0, 0
    tokens = inventory.text.tokens * _FLOAT
    teachers = tokens * sum(unit.leaves for unit in part.of("linear", "norm", "experts"))
    place = outputs_place(inventory, room)
    whole = {"device": room.gpu or room.host, "host": room.host, "disk": room.disk}[place]
    if 2 * teachers > SHARE * whole:
        return 0, 0
    groups = [group for group in part.groups if group[0].kind in ("linear", "experts")]
    return teachers, tokens * sum(unit.leaves for group in groups[:-1] for unit in group)


def chunk_bytes(part: PartSize, inventory: Inventory) -> int:
    """What a run of one chunk of sequences holds."""
    length = inventory.text.length
    tokens = max(1, CHUNK_TOKENS // length) * length
    leaves = sum(leaving(unit) for unit in part.units if unit.kind != "head")
    return _LIVE * _FLOAT * tokens * leaves


def sums_bytes(group: Iterable[UnitShape], unknowns: int, models: int, *, metrics: bool) -> int:
    """Gram matrices and right-hand sides of linears that see one input, at their most."""
    units = tuple(group)
    columns = units[0].enters
    size = precision(unknowns * columns).itemsize
    gram = size * columns**2
    cross = size * columns * sum(unit.leaves for unit in units)
    if metrics:
        return models * (gram + cross)
    # One model's sums, and those of the models before it, which each unit has of its own.
    before = len(units) * gram + cross
    return before + (gram + cross if models > 1 else 0) + _FLOAT * columns**2


def solve_bytes(unit: UnitShape, unknowns: int, terms: int) -> int:
    """What solving for one linear takes beside its sums."""
    columns, weight = unit.enters, unit.enters * unit.leaves
    size = precision(unknowns * columns).itemsize
    # The average goes before the directions come; a residual a term, a product on its way.
    work = size * weight * (unknowns + terms + 2)
    if unknowns * columns > DENSE_LIMIT:
        return work + size * weight + 3 * _DOUBLE * columns * unknowns**2
    # The factor takes the place of the matrix, which is fp32, as are copies of what it is made of.
    copies = 0 if size == _FLOAT else _FLOAT * (unknowns * weight + columns**2)
    return work + copies + _FLOAT * ((unknowns * columns) ** 2 + columns**2)


def metric_bytes(units: Iterable[UnitShape], inventory: Inventory) -> int:
    """Metrics of linears for every model: matrices, or gradients where these are fewer."""
    text = inventory.text
    gradient_tokens = text.first_tokens(TOKENS) // max(1, text.models)
    rows = (u.leaves if 2 * gradient_tokens > u.leaves else gradient_tokens for u in units)
    return text.models * sum(_FLOAT * n * u.leaves for n, u in zip(rows, tuple(units), strict=True))


def fit_need(part: PartSize, inventory: Inventory, room: Room, *, metrics: bool) -> Need:
    """The fit of one part, without streams and what others keep."""
    text = inventory.text
    weights = _FLOAT * part.parameters
    copies = weights if _half(part) else 0
    written = sum(tensor.written for tensor in part.tensors)
    need = Need(f"fit of {_article(part)}").plus(
        device=weights + sum(tensor.converted for tensor in part.tensors)
    )
    if part.kind == "output":
        return need.plus(device=_head_bytes(part, inventory))
    teachers, merged = output_cache_bytes(part, inventory, room)
    place = outputs_place(inventory, room)
    chunk = chunk_bytes(part, inventory)
    if part.kind == "input":
        rows = 2 * _DOUBLE * part.unknowns * ROWS * inventory.hidden
        # A teacher runs; or rows are fitted; or the part is examined with its weights scattered.
        return need.plus(device=max(copies + chunk, rows, weights))
    metrics = metrics and part.kind == "block"
    moments = [copies]
    kept = metric_bytes(part.of("linear"), inventory) if metrics else 0
    if metrics:
        gradient_tokens = text.first_tokens(TOKENS) // max(1, text.models)
        rows = 2 * _FLOAT * gradient_tokens * sum(unit.leaves for unit in part.of("linear"))
        moments.append(weights)
        chunk += rows
        gradient_tokens = 2 * len(part.of("experts")) * inventory.hidden
        kept += _FLOAT * gradient_tokens * text.first_tokens(TOKENS)
    for group in _solved_together(part):
        sums = sums_bytes(group, part.unknowns, text.models, metrics=metrics)
        # Of what judges, targets are as kept on the tape; what enters is a copy.
        judging = _FLOAT * text.held_out_tokens * (group[0].enters + group[0].leaves)
        terms = text.models if metrics else 1
        solving = max(solve_bytes(unit, part.unknowns, terms) for unit in group)
        moments.append(sums + judging + max(0 if teachers else copies, solving))
    # Chunks and gradients are in pieces so small that the process keeps what it had of them.
    need = need.plus(device=kept + chunk + max(moments) + written)
    if part.of("experts"):  # what enters them in both models, kept as the streams are
        need = _flowing(need, 2 * stream_bytes(inventory), inventory, room)
    cached = teachers + merged
    return need.plus(
        device=cached if place == "device" else 0, host=cached if place == "host" else 0
    )


def _solved_together(part: PartSize) -> Iterator[Group]:
    """Linears that share a Gram matrix; of experts, one of one of them."""
    for group in part.groups:
        if group[0].kind in ("linear", "router"):
            yield group
        for linear in group[0].linears:
            yield (linear,)


def _head_bytes(part: PartSize, inventory: Inventory) -> int:
    """The descent of a head: merged weight, gradient, their successors, and a sequence's logits."""
    if not part.fits_head:
        return 0
    weight = _FLOAT * sum(unit.parameters for unit in part.of("head"))
    logits = _LOGITS * _FLOAT * inventory.text.length * inventory.vocabulary
    copied = _half(part)
    return max(weight * (4 if copied else 3) + (weight // 2 if copied else 0), 4 * weight + logits)


def judge_need(inventory: Inventory) -> Need:
    """The judgement of the whole model: the outputs of all models at hand, a sequence's logits."""
    part = inventory.parts[-1]
    weights = _FLOAT * part.parameters
    copies = inventory.text.models * weights if _half(part) else 0
    logits = _LOGITS * _FLOAT * inventory.text.length * inventory.vocabulary
    loaded = sum(tensor.converted for tensor in part.tensors)
    return Need("judgement of the whole model", device=loaded + weights + copies + logits)


def backward_need(part: PartSize, inventory: Inventory, *, weights_too: bool) -> Need:
    """A run of a part on one chunk and back."""
    weights = _FLOAT * part.parameters
    logits = _LOGITS * _FLOAT * inventory.text.length * inventory.vocabulary
    inner = logits if part.kind == "output" else 2 * chunk_bytes(part, inventory)
    loaded = sum(tensor.converted for tensor in part.tensors)
    return Need(
        f"backward through {_article(part)}",
        device=loaded + weights * (3 if weights_too else 2) + inner,
    )


def kept_weights(inventory: Inventory, room: Room) -> int:
    """Bytes of the sources that stay in memory between sweeps, pages of files included."""
    assert inventory.settings is not None
    every = sum(tensor.loaded for part in inventory.parts for tensor in part.tensors)
    if inventory.settings.resident == "always":
        return every
    if inventory.settings.resident == "never":
        return 0
    if not room.gpu and not any(t.converted for part in inventory.parts for t in part.tensors):
        # Pages of files leave as much memory available as before, until there are too many.
        return every if every <= room.host else 0
    return min(every, int((1 - SPARE) * (room.gpu or room.host)))


def phases(inventory: Inventory, room: Room) -> list[Need]:
    """Every phase of a merge with all that is held meanwhile."""
    written = sum(tensor.written for tensor in inventory.tensors)
    shard = min(written, room.shard) if room.shard > 0 else written
    mapped = room.libraries + sum(max(files, default=0) for files in inventory.files)
    settings = inventory.settings
    largest = max(inventory.tensors, key=lambda tensor: tensor.parameters)
    writing = Need("merging and writing", host=shard, mapped=mapped).plus(
        device=largest.converted + 2 * _FLOAT * largest.parameters
    )
    if settings is None:
        return [_with_baseline(writing, room)]
    one = stream_bytes(inventory)
    moving = 3 * one + one // max(1, inventory.text.models)
    fits = _distinct(inventory)
    if settings.one_sweep:
        needs = [
            _flowing(fit_need(part, inventory, room, metrics=False), moving, inventory, room).plus(
                host=shard, mapped=mapped
            )
            for part in fits
        ]
        return [_with_baseline(need, room) for need in [*needs, writing]]
    kept = kept_weights(inventory, room)
    converted = sum(t.converted for part in inventory.parts for t in part.tensors)
    every = room.libraries + sum(sum(files) for files in inventory.files)
    held = Need("", device=kept if room.gpu else min(kept, converted))
    held = held.plus(mapped=every if kept else mapped)
    needs = []
    if settings.objective != "logits":
        metrics = settings.metric == "sensitivity"
        for part in fits:
            need = fit_need(part, inventory, room, metrics=metrics)
            needs.append(_flowing(need, 2 * one + moving, inventory, room))
        needs.append(_flowing(judge_need(inventory), 4 * one, inventory, room))
        if metrics:
            needs += [
                _flowing(
                    backward_need(part, inventory, weights_too=False), 3 * one, inventory, room
                )
                for part in fits
                if part.kind != "input"
            ]
    else:
        needs.append(_flowing(judge_need(inventory), 2 * one, inventory, room))
    if settings.objective != "layer":
        cached = _FLOAT * sum(part.parameters for part in inventory.parts) if kept else 0
        unknowns = (
            4 * _DOUBLE * sum(u.enters * p.unknowns for p in inventory.parts for u in p.units)
        )
        for part in fits:
            need = backward_need(part, inventory, weights_too=True)
            need = replace(need, phase="descent: " + need.phase).plus(device=cached + unknowns)
            needs.append(_flowing(need, 2 * one, inventory, room))
    needs = [need.plus(device=held.device, mapped=held.mapped) for need in needs]
    return [_with_baseline(need, room) for need in [*needs, writing]]


def disk_bytes(inventory: Inventory, room: Room) -> int:
    """Bytes of hidden states, and of what units put out, kept in files while a merge runs."""
    settings = inventory.settings
    if settings is None:
        return 0
    one = stream_bytes(inventory)
    count = 0
    if stream_place(inventory, room) == "disk":
        count += (3 if settings.one_sweep else 5) * one
    if outputs_place(inventory, room) == "disk" and settings.objective != "logits":
        count += max(sum(output_cache_bytes(part, inventory, room)) for part in inventory.parts)
    depth = len(inventory.blocks)
    if settings.metric == "sensitivity" and settings.objective != "logits":
        count += 2 * depth * _FLOAT * inventory.hidden * inventory.text.first_tokens(TOKENS)
    elif settings.objective != "layer":
        tokens = settings.batch_size * inventory.text.length * inventory.text.models
        count += depth * _FLOAT * inventory.hidden * tokens
    return count


def _flowing(need: Need, streams: int, inventory: Inventory, room: Room) -> Need:
    place = stream_place(inventory, room)
    return need.plus(
        device=streams if place == "device" else 0, host=streams if place == "host" else 0
    )


def _with_baseline(need: Need, room: Room) -> Need:
    return need.plus(host=room.baseline)


def _distinct(inventory: Inventory) -> list[PartSize]:
    """Parts that differ in more than their tensors' names."""
    found: dict[tuple[str, tuple[Group, ...], tuple[TensorSize, ...]], PartSize] = {}
    for part in inventory.parts:
        sizes = tuple(replace(tensor, name="") for tensor in part.tensors)
        found.setdefault((part.kind, part.groups, sizes), part)
    return list(found.values())


def _half(part: PartSize) -> bool:
    return any(tensor.half for tensor in part.tensors)


def _article(part: PartSize) -> str:
    return {"input": "the input", "block": "a block", "output": "the output"}[part.kind]
