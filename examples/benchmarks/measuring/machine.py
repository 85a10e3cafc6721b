"""The machine, the packages and the command of a benchmark, for its report."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("mergekit-dam", "mergekit", "torch", "transformers", "safetensors")
_CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Processor, cores, memory (GB of 1e9 bytes), torch's threads and versions, for a report."""
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in _PACKAGES)]
        ),
    }


def command_line() -> str:
    """The command that started this process, as one can type it again in the checkout."""
    spec = sys.modules["__main__"].__spec__
    program = ["python", "-m", spec.name] if spec else [sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])


def processor() -> str:
    """The processor's name, or at least its architecture."""
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines() if _CPU_INFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
