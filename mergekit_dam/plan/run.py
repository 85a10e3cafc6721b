"""The command `mergekit-dam plan`, step by step.

1. Plan the merge from headers and configurations, and take inventory.
2. See what this process takes by then: a merge takes as much before it reads a weight.
3. Calibrate the machine.
4. Estimate.
"""

import time
from pathlib import Path

import psutil
import torch
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError
from mergekit_dam.plan.estimate import Estimate, estimate
from mergekit_dam.plan.inventory import Inventory, take_inventory
from mergekit_dam.plan.machine import calibrate
from mergekit_dam.plan.memory import Room
from mergekit_dam.plan.stages import plan_merge


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
