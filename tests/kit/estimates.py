"""Planned merges, and a machine and memory of known size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_dam.estimate.estimate import Estimate, estimate
from mergekit_dam.estimate.inventory import Inventory, take_inventory
from mergekit_dam.estimate.machine import Machine
from mergekit_dam.estimate.memory import Room
from mergekit_dam.estimate.merge import PlannedMerge, plan_merge

GB = 10**9
SPEEDS = Machine(
    forward=1e9,
    fp32=1e9,
    fp64=5e8,
    cholesky=2e8,
    elements=1e8,
    read=1e8,
    write=5e7,
    memory=64 * GB,
    available=64 * GB,
    disk=100 * GB,
)
ROOM = Room(
    host=64 * GB,
    gpu=0,
    disk=100 * GB,
    baseline=300_000_000,
    libraries=100_000_000,
    shard=5 * GB,
)


def planned(folder: Path, configuration: Mapping[str, Any]) -> PlannedMerge:
    file = folder / "dam.yaml"
    file.write_text(yaml.safe_dump(dict(configuration)), encoding="utf-8")
    LoaderCache.loaders.clear()
    return plan_merge(file, MergeOptions(quiet=True), folder / "out")


def inventory(folder: Path, configuration: Mapping[str, Any]) -> Inventory:
    return take_inventory(planned(folder, configuration))


def planned_estimate(found: Inventory, room: Room = ROOM, machine: Machine = SPEEDS) -> Estimate:
    return estimate(found, machine, room, startup=5.0)
