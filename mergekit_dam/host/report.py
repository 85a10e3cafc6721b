"""`dam_report.json`: the inputs of a merge, and the result of every fit."""

import dataclasses
import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mergekit_dam
from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.coefficients.record import MergeRecord, Trial
from mergekit_dam.coefficients.tensors import TensorReport
from mergekit_dam.stored import written_whole

FILE_NAME = REPORT_NAME


def versions() -> dict[str, str]:
    """Versions of the packages that take part in a merge."""
    packages = ("mergekit", "torch", "transformers", "safetensors")
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"mergekit-dam": mergekit_dam.__version__, **found}


def coefficient_statistics(
    coefficients: Tensor, sources: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Mean, deviation, minimum and maximum of every source's row of fp32 `[sources, n]`."""
    return {
        source: {
            "mean": float(row.double().mean()),
            "std": float(row.double().std(correction=0)),
            "min": float(row.min()),
            "max": float(row.max()),
        }
        for source, row in zip(sources, coefficients, strict=True)
    }


def tensor_entry(
    report: TensorReport, coefficients: Tensor, sources: Sequence[str], norm: float | None = None
) -> dict[str, Any]:
    """The report's entry of one tensor; `norm` is that of its correction, if it has one."""
    known = dataclasses.asdict(report).items()
    entry = {key: value for key, value in known if value not in (None, {}) and key != "seconds"}
    if norm is not None:
        entry["correction"] = {**report.correction, "norm": norm}
    return {**entry, "coefficients": coefficient_statistics(coefficients, sources)}


def trial_entry(trial: Trial) -> dict[str, Any]:
    """The report's entry of one trial of a search."""
    elsewhere = ("seconds", "text_losses")
    return {key: value for key, value in dataclasses.asdict(trial).items() if key not in elsewhere}


def this_run(record: MergeRecord) -> dict[str, Any]:
    """What differs from run to run: the only such section of the report."""
    return {
        "seconds": record.seconds,
        "tensor_seconds": {name: entry.seconds for name, entry in record.reports.items()},
        "trial_seconds": [trial.seconds for trial in record.trials],
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process so far, on the host and on every GPU it used."""
    peak: dict[str, int] = {}
    if sys.platform != "win32":
        import resource  # Windows does not have it

        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak["host"] = host if sys.platform == "darwin" else host * 1024
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            peak[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peak


def _finite(value: Any) -> Any:
    """Plain values with None in place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report; a number that is not finite, which JSON does not have, becomes null."""
    text = _text(_finite(report))
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _text(report: Mapping[str, Any]) -> str:
    """JSON with a line for every entry of a section: every tensor, model and trial has one."""
    sections = []
    for key, value in report.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, dict) and value:
            pairs = (f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items())
            text = "{\n  " + ",\n  ".join(pairs) + "\n }"
        elif isinstance(value, list) and value:
            entries = (json.dumps(entry, allow_nan=False) for entry in value)
            text = "[\n  " + ",\n  ".join(entries) + "\n ]"
        sections.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(sections) + "\n}\n"
