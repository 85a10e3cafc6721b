"""The estimate of a merge: what it reads, computes, holds and takes, and what does not fit.

planned merge -> inventory -> sweeps (bytes, flops) + phases (memory) -> with the machine: minutes
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError
from mergekit_dam.estimate.advice import problems
from mergekit_dam.estimate.inventory import Inventory, take_inventory
from mergekit_dam.estimate.machine import Machine, calibrate
from mergekit_dam.estimate.memory import Need, Room, disk_bytes, stream_place
from mergekit_dam.estimate.merge import plan_merge
from mergekit_dam.estimate.phases import phases
from mergekit_dam.estimate.sweeps import Sweep, sweeps
from mergekit_dam.fitting.costs import Work


@dataclass(frozen=True)
class Estimate:
    """What a merge costs.

    Attributes:
        sweeps: in order; the time of each in seconds is in `seconds`.
        startup: seconds before the first sweep.
        needs: memory by phase.
        streams: where hidden states are kept between blocks; empty in a replay.
        scratch: bytes of hidden states in files.
        problems: what would not fit, each with what to turn.
    """

    inventory: Inventory
    machine: Machine
    room: Room
    sweeps: tuple[Sweep, ...]
    seconds: tuple[float, ...]
    startup: float
    needs: tuple[Need, ...]
    streams: str
    scratch: int
    problems: tuple[str, ...]

    @property
    def least_seconds(self) -> float:
        """With what is certain to be gone through."""
        pairs = zip(self.sweeps, self.seconds, strict=True)
        return self.startup + sum(seconds for sweep, seconds in pairs if sweep.certain)

    @property
    def most_seconds(self) -> float:
        """With all that may be."""
        return self.startup + sum(self.seconds)

    @property
    def host(self) -> Need:
        """The phase with most memory of the process's own on the host."""
        return max(self.needs, key=self.own)

    @property
    def gpu(self) -> Need:
        """The phase with most memory on the accelerator."""
        return max(self.needs, key=lambda need: need.device)

    @property
    def resident_bytes(self) -> int:
        """The most resident memory, pages of mapped files included."""
        return max(map(self.resident, self.needs))

    def own(self, need: Need) -> int:
        """Bytes of a phase on the host, without pages of mapped files."""
        return need.host + (0 if self.room.gpu else need.device)

    def resident(self, need: Need) -> int:
        """Bytes of a phase on the host, with as many pages of mapped files as there is room for."""
        own = self.own(need)
        return max(own, min(own + need.mapped, self.room.host))


def estimate(inventory: Inventory, machine: Machine, room: Room, *, startup: float) -> Estimate:
    """Put an estimate together.

    Args:
        startup: seconds that a merge takes before it reads a weight.
    """
    every = tuple(sweeps(inventory, room))
    needs = tuple(phases(inventory, room))
    settings = inventory.settings
    return Estimate(
        inventory=inventory,
        machine=machine,
        room=room,
        sweeps=every,
        seconds=tuple(sweep_seconds(sweep, machine) for sweep in every),
        startup=startup,
        needs=needs,
        streams="" if settings is None else stream_place(inventory, room),
        scratch=disk_bytes(inventory, room),
        problems=tuple(problems(inventory, machine, room, needs)),
    )


def sweep_seconds(sweep: Sweep, machine: Machine) -> float:
    """Of computing, and of reading and writing: one waits for the other."""
    return (
        work_seconds(sweep.work, machine) + sweep.read / machine.read + sweep.write / machine.write
    )


def work_seconds(work: Work, machine: Machine) -> float:
    """Of computing alone."""
    return sum(count / machine.speed(speed) for (_, speed), count in work.items())


def work_of(sweeps: Sequence[Sweep]) -> Work:
    """What all of them compute."""
    total = Work()
    for sweep in sweeps:
        total += sweep.work
    return total


def run_plan(file: Path, out_path: Path, options: MergeOptions) -> Estimate:
    """Estimate what a merge of a configuration would cost here.

    Args:
        out_path: where the merged model would go.

    Raises:
        DamError: the merge would be refused, or there is no GPU where one is asked for.
    """
    device = torch.device(options.device or "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DamError(
            "--cuda: torch finds no GPU on this machine, whose speed and memory an estimate is of; "
            "leave it out, or run the plan where the merge will run"
        )
    inventory = take_inventory(plan_merge(file, options, out_path))
    startup = time.time() - psutil.Process().create_time()
    own, mapped = _memory()
    settings = inventory.settings
    dtype = torch.float32 if settings is None else settings.dtype_on(device)
    machine = calibrate(inventory.hidden, _widest(inventory), out_path, device, dtype)
    limit = None if settings is None else settings.gpu_memory
    room = Room(
        host=machine.memory,
        gpu=min(machine.gpu, limit) if limit else machine.gpu,
        disk=machine.disk,
        baseline=own,
        libraries=mapped,
        shard=options.out_shard_size,
    )
    return estimate(inventory, machine, room, startup=startup)


def _memory() -> tuple[int, int]:
    """Bytes of this process's own, and of files mapped into it where the system tells."""
    memory = psutil.Process().memory_info()
    mapped = getattr(memory, "shared", 0)
    return memory.rss - mapped, mapped


def _widest(inventory: Inventory) -> int:
    """Features of the widest linear of the blocks."""
    widths = [max(u.enters, u.leaves) for b in inventory.blocks for u in b.of("linear")]
    return max(widths, default=1)
