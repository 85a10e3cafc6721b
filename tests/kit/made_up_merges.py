"""Merges on the made-up device, in a process of their own.

    runs = merged_there([Job(configuration, str(tmp_path / "out"))], tmp_path)

A job without numbers has shapes alone. What blocks are made of cannot be seen then: it is taken
from a merge of small models that are built alike.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

TERABYTE = 10**12


@dataclass(frozen=True)
class Job:
    """One merge.

    Attributes:
        memory: Bytes of the device.
        alike: Configuration of a merge of small models; the job has shapes alone.
    """

    configuration: Mapping[str, Any]
    out: str
    memory: int = TERABYTE
    alike: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """What the device saw of a merge.

    Attributes:
        waits: line of the package -> how often the host waited there.
        peak: the most bytes that were allocated.
        at_peak: the line that allocated the last of them.
    """

    waits: Mapping[str, int]
    peak: int
    at_peak: str


def merged_there(jobs: Sequence[Job], folder: Path) -> list[Run]:
    """Run merges one after the other; what they write is in their folders."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    command = [sys.executable, "-m", "tests.kit.made_up_merges", str(listed)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(listed.with_suffix(".results").read_text("utf-8"))
    return [Run(**own) for own in found]


def _merged(job: Job) -> Run:
    # Imported here: torch offers the device to the whole process then.
    from tests.kit.made_up_device import NAME, MadeUpDevice
    from tests.kit.merging import merge

    device = MadeUpDevice(job.memory, numbers=job.alike is None)
    out = Path(job.out)
    if job.alike is None:
        with device:
            merge(job.configuration, out, device=NAME)
    else:
        with _alike(job.alike, out.with_name("alike")), device:
            merge(job.configuration, out, device=NAME)
    return Run(dict(device.waits), device.peak, device.at_peak)


def _alike(configuration: Mapping[str, Any], out: Path) -> Any:
    """Take what blocks are made of from a merge of small models."""
    from mergekit_dam.coefficients.tensors import TensorSources
    from mergekit_dam.sources.stage import Models
    from tests.kit.merging import merge

    known: dict[Any, Any] = {}
    examine = Models.examine

    def key(part: Any, weights: Any) -> Any:
        return part.residual, *sorted(weights)

    def remembered(models: Any, part: Any, weights: Any, like: Any) -> Any:
        return known.setdefault(key(part, weights), examine(models, part, weights, like))

    with mock.patch.object(Models, "examine", remembered):
        merge(configuration, out)
    again = contextlib.ExitStack()
    again.enter_context(
        mock.patch.object(Models, "examine", lambda _, part, own, like: known[key(part, own)])
    )
    again.enter_context(mock.patch.object(TensorSources, "identical", False))
    return again


if __name__ == "__main__":
    listed = Path(sys.argv[1])
    found = [asdict(_merged(Job(**job))) for job in json.loads(listed.read_text("utf-8"))]
    listed.with_suffix(".results").write_text(json.dumps(found), encoding="utf-8")
