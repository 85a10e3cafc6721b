"""An estimate as tables of text for people, and as JSON for programs."""

import math
import textwrap
from dataclasses import asdict
from typing import Any

from mergekit_dam.estimate.estimate import Estimate
from mergekit_dam.estimate.flops import total
from mergekit_dam.estimate.limit import Limited
from mergekit_dam.estimate.memory import Need
from mergekit_dam.estimate.sweeps import Sweep
from mergekit_dam.tables import aligned, duration, size

_MEANING = (
    "Memory is the process's own; with mapped files, also pages of weights that the system "
    "takes back when it must. "
)
_MEASURED = "Times are for this machine as busy as it was just now."
_PUBLISHED = (
    "Times come from published rates of an {gpu} of {memory}, and from this machine's disk; "
    "they may be off by a factor of two."
)


def to_json(estimate: Estimate) -> dict[str, Any]:
    """Everything, in bytes, flops and seconds."""
    inventory = estimate.inventory
    pairs = zip(estimate.sweeps, estimate.seconds, strict=True)
    return {
        "sources": inventory.sources,
        "blocks": len(inventory.blocks),
        "tensors": len(inventory.tensors),
        "parameters": sum(tensor.parameters for tensor in inventory.tensors),
        "calibration": asdict(inventory.text),
        "startup_seconds": estimate.startup,
        "sweeps": [_sweep_json(sweep, seconds) for sweep, seconds in pairs],
        "seconds": {"least": estimate.least_seconds, "most": estimate.most_seconds},
        "max_minutes": None if estimate.limited is None else asdict(estimate.limited),
        "work": _work_json(estimate),
        "memory": [_need_json(estimate, need) for need in estimate.needs],
        "peak_host_bytes": estimate.own(estimate.host),
        "peak_host_bytes_with_mapped_files": estimate.resident_bytes,
        "peak_gpu_bytes": estimate.gpu.device if estimate.room.gpu else 0,
        "streams": estimate.streams,
        "scratch_bytes": estimate.scratch,
        "correction_bytes": inventory.corrections,
        # Where no file can be written, the disk has no speed, which JSON could not say.
        "machine": {
            name: None if value == math.inf else value
            for name, value in asdict(estimate.machine).items()
        },
        "problems": list(estimate.problems),
    }


def _sweep_json(sweep: Sweep, seconds: float) -> dict[str, Any]:
    return {
        "name": sweep.name,
        "condition": sweep.condition,
        "read_bytes": sweep.read,
        "write_bytes": sweep.write,
        "flops": total(sweep.work),
        "seconds": seconds,
    }


def _work_json(estimate: Estimate) -> list[dict[str, Any]]:
    """Kinds of work of the sweeps that are always run."""
    return [
        {
            "kind": kind,
            "of": "elements" if speed == "elements" else "flops",
            "speed": speed,
            "count": count,
            "seconds": count / estimate.machine.speed(speed),
        }
        for (kind, speed), count in estimate.certain_work.items()
    ]


def _need_json(estimate: Estimate, need: Need) -> dict[str, Any]:
    return {
        "phase": need.phase,
        "host_bytes": estimate.own(need),
        "host_bytes_with_mapped_files": estimate.resident(need),
        "gpu_bytes": need.device if estimate.room.gpu else 0,
    }


def table(estimate: Estimate, width: int = 88) -> str:
    """The same for people, in a few tables.

    Args:
        width: Columns of the terminal.
    """
    parts = [_wrapped(_models(estimate), width), _sweeps(estimate, width)]
    if estimate.limited is not None:
        parts.append(_wrapped(_limited(estimate.limited), width))
    parts += [_work(estimate), _memory(estimate, width)]
    machine = estimate.machine
    published = _PUBLISHED.format(gpu=machine.published, memory=size(machine.gpu))
    times = published if machine.published else _MEASURED
    return "\n\n".join([*parts, _verdict(estimate), _wrapped(_MEANING + times, width)])


def _wrapped(text: str, width: int) -> str:
    """Lines of text that are no longer than the terminal."""
    return "\n".join(textwrap.fill(line, min(width, 88)) for line in text.splitlines())


def _models(estimate: Estimate) -> str:
    inventory, text = estimate.inventory, estimate.inventory.text
    parameters = sum(tensor.parameters for tensor in inventory.tensors)
    lines = [
        f"{inventory.sources} sources of {len(inventory.blocks)} blocks, "
        f"{len(inventory.tensors)} tensors, {parameters / 1e6:,.1f}M parameters each"
        if inventory.settings is not None
        else f"without a fit: {inventory.sources} sources of {len(inventory.tensors)} tensors, "
        f"{parameters / 1e6:,.1f}M parameters each"
    ]
    if inventory.settings is not None:
        counts = " + ".join(map(str, text.sequences))
        if inventory.corrections:
            lines.append(
                f"corrections: at most {size(inventory.corrections)} beside the merged model"
            )
        lines.append(
            f"{counts} sequences of {text.length} tokens, {sum(text.held_out)} of them held out; "
            f"temporary files: {size(estimate.scratch)}, streams on the {estimate.streams}"
        )
    return "\n".join(lines)


def _sweeps(estimate: Estimate, width: int) -> str:
    rows = [["start", "", "", "", duration(estimate.startup)]]
    for sweep, seconds in zip(estimate.sweeps, estimate.seconds, strict=True):
        name = sweep.name if sweep.certain else f"{sweep.name}, {sweep.condition}"
        flops = f"{total(sweep.work) / 1e12:,.2f}"
        rows.append([name, size(sweep.read), size(sweep.write), flops, duration(seconds)])
    read = sum(sweep.read for sweep in estimate.sweeps if sweep.certain)
    written = sum(sweep.write for sweep in estimate.sweeps if sweep.certain)
    flops = f"{total(estimate.certain_work) / 1e12:,.2f}"
    rows.append(["in all", size(read), size(written), flops, duration(estimate.least_seconds)])
    if estimate.most_seconds > estimate.least_seconds:
        rows.append(["at most", "", "", "", duration(estimate.most_seconds)])
    return aligned(["sweep", "reads", "writes", "Tflop", "time"], rows, width)


def _limited(limited: Limited) -> str:
    """What `max_minutes` buys."""
    rows = [
        [
            each.phase,
            ("yes" if each.steps is None else f"{each.steps} steps") if each.fits else "no",
        ]
        for each in limited.phases
    ]
    found = aligned([f"within `max_minutes` ({duration(limited.limit)})", "fits"], rows)
    if limited.always > limited.limit:
        return f"{found}\nWhat is always run takes longer: {duration(limited.always)}."
    return f"{found}\nThe merge takes {duration(limited.most)} at most."


def _work(estimate: Estimate) -> str:
    """Kinds of work of the sweeps that are always run, the longest first."""
    found: dict[str, tuple[float, float]] = {}
    for (kind, speed), count in estimate.certain_work.items():
        flops, seconds = found.get(kind, (0.0, 0.0))
        own = 0 if speed == "elements" else count
        found[kind] = (flops + own, seconds + count / estimate.machine.speed(speed))
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    rows = [[kind, f"{flops / 1e12:,.2f}", duration(seconds)] for kind, (flops, seconds) in ordered]
    return aligned(["work", "Tflop", "time"], rows)


def _memory(estimate: Estimate, width: int) -> str:
    head = ["memory at most", "host", "with mapped files"]
    rows = []
    for need in estimate.needs:
        own = estimate.own(need)
        rows.append([need.phase, size(own), size(estimate.resident(need))])
        if estimate.room.gpu:
            rows[-1].append(size(need.device))
    last = ["peak", size(estimate.own(estimate.host)), size(estimate.resident_bytes)]
    if estimate.room.gpu:
        head.append("GPU")
        last.append(size(estimate.gpu.device))
    return aligned(head, [*rows, last], width)


def _verdict(estimate: Estimate) -> str:
    if not estimate.problems:
        return "Everything fits in memory and on the disk. Text was not read."
    return "\n".join(["What would not fit:", *(f"  - {each}" for each in estimate.problems)])
