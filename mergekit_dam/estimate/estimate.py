"""The estimate of a merge: bytes, flops, memory and time, and what does not fit.

1. The merge is planned as mergekit would plan it, and its sizes are taken (`merge`, `inventory`).
2. They give the sweeps, with bytes and flops, and the phases, with memory (`sweeps`, `phases`).
3. Speeds measured on this machine turn bytes and flops into seconds (`machine`).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError
from mergekit_dam.estimate.advice import problems
from mergekit_dam.estimate.disk import disk_bytes
from mergekit_dam.estimate.gpus import Gpu
from mergekit_dam.estimate.inventory import Inventory, take_inventory
from mergekit_dam.estimate.limit import Limited, within
from mergekit_dam.estimate.machine import Machine, calibrate, with_gpu
from mergekit_dam.estimate.memory import Need, Room, stream_place
from mergekit_dam.estimate.merge import planned
from mergekit_dam.estimate.phases import phases
from mergekit_dam.estimate.sweeps import Sweep, sweeps
from mergekit_dam.fitting.costs import Work
from mergekit_dam.host import plugin
from mergekit_dam.host.output import check_output
from mergekit_dam.request.document import Document
from mergekit_dam.request.reading import read_configuration
from mergekit_dam.threads import use_own_share


@dataclass(frozen=True)
class Estimate:
    """The cost of a merge.

    Attributes:
        inventory: sizes of the merge.
        machine: speeds and sizes of the machine.
        room: memory that the merge may use.
        sweeps: sweeps in the order they are run; `seconds` has the time of each.
        startup: seconds before the first sweep.
        needs: memory by phase.
        streams: where hidden states are kept between blocks; empty in a replay.
        scratch: bytes of temporary files: hidden states, corrections.
        problems: sentences about what would not fit, each with the parameters to change.
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
    def certain_work(self) -> Work:
        """Work of the sweeps that are always run."""
        work = Work()
        for sweep in self.sweeps:
            if sweep.certain:
                work += sweep.work
        return work

    @property
    def least_seconds(self) -> float:
        """Seconds of the merge if only those sweeps are run that always are."""
        pairs = zip(self.sweeps, self.seconds, strict=True)
        return self.startup + sum(seconds for sweep, seconds in pairs if sweep.certain)

    @property
    def most_seconds(self) -> float:
        """Seconds of the merge if all sweeps are run."""
        return self.startup + sum(self.seconds)

    @property
    def limited(self) -> Limited | None:
        """What fits into `max_minutes`; None where time is not limited."""
        settings = self.inventory.settings
        if settings is None or settings.max_minutes is None:
            return None
        return within(60 * settings.max_minutes, self.startup, self.sweeps, self.seconds)

    @property
    def host(self) -> Need:
        """The phase that takes most of the process's own memory on the host."""
        return max(self.needs, key=self.own)

    @property
    def gpu(self) -> Need:
        """The phase that takes most memory on the GPU."""
        return max(self.needs, key=lambda need: need.device)

    @property
    def resident_bytes(self) -> int:
        """The most resident memory on the host, pages of mapped files included."""
        return max(map(self.resident, self.needs))

    def own(self, need: Need) -> int:
        """Bytes of a phase on the host, without pages of mapped files."""
        return need.host + (0 if self.room.gpu else need.device)

    def resident(self, need: Need) -> int:
        """Bytes of a phase on the host, with as many pages of mapped files as have room."""
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
    """Seconds of a sweep: computing, reading and writing wait for one another."""
    return (
        work_seconds(sweep.work, machine) + sweep.read / machine.read + sweep.write / machine.write
    )


def work_seconds(work: Work, machine: Machine) -> float:
    """Seconds of computing alone."""
    return sum(count / machine.speed(speed) for (_, speed), count in work.items())


def run_plan(
    file: Path, out_path: Path | None, options: MergeOptions, gpu: Gpu | None = None
) -> Estimate:
    """Estimate the cost of the merge of a file; otherwise as `plan_of`."""
    plugin.install()
    return plan_of(*read_configuration(file), out_path, options, gpu)


def plan_of(
    config: MergeConfiguration,
    document: Document,
    out_path: Path | None,
    options: MergeOptions,
    gpu: Gpu | None = None,
) -> Estimate:
    """Estimate the cost of a merge on this machine.

    Args:
        config: the configuration, read with the plugin installed.
        document: the YAML that it is of.
        out_path: where the merged model would go; if it is not said, somewhere on the disk of the
            current folder.
        options: options of the merge.
        gpu: a GPU that this machine need not have; it takes the place of the options' device.

    Raises:
        DamError: the merge would be refused, or there is no GPU where one is asked for.
    """
    use_own_share()
    device = torch.device("cuda" if gpu is not None else options.device or "cpu")
    if gpu is None and device.type == "cuda" and not torch.cuda.is_available():
        raise DamError(
            "--cuda: torch finds no GPU on this machine, whose speed and memory an estimate is of; "
            "leave it out, run the plan where the merge will run, or name the GPU with --gpu"
        )
    if out_path is not None:
        check_output(out_path.resolve(), config.referenced_models())
    out_path = out_path or Path()
    inventory = take_inventory(planned(config, document, options, out_path))
    startup = time.time() - psutil.Process().create_time()
    own, mapped = _memory()
    settings = inventory.settings
    dtype = torch.float32 if settings is None else settings.dtype_on(device)
    if gpu is None:
        machine = calibrate(inventory.hidden, _widest(inventory), out_path, device, dtype)
    else:
        machine = with_gpu(gpu, out_path, dtype)
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
    """Bytes of this process's own memory, and of files mapped into it where the system tells."""
    memory = psutil.Process().memory_info()
    mapped = getattr(memory, "shared", 0)
    return memory.rss - mapped, mapped


def _widest(inventory: Inventory) -> int:
    """Input or output features of the widest linear of the blocks."""
    widths = [max(u.enters, u.leaves) for b in inventory.blocks for u in b.of("linear")]
    return max(widths, default=1)
