"""The files that a dam merge writes beside the merged model: coefficients and a report."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ParameterSetting
from pydantic import TypeAdapter

from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME, CoefficientFile
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.host import report
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.host.synthetic import keep
from mergekit_dam.report.page import make_page

_PARAMETERS = TypeAdapter(dict[str, ParameterSetting])
"""Converts parameters to plain values: a parsed filter is an object that JSON cannot hold."""


def write_artifacts(
    prepared: Prepared,
    order: Sequence[ModelReference],
    trust_remote_code: bool,
    parameters: Mapping[str, Any],
    out_path: Path,
    record: MergeRecord,
) -> None:
    """Write coefficients, a report, corrections if there are any, and text that models wrote."""
    sources = [str(model) for model in order]
    if prepared.replay is not None:
        provenance = {k: v for k, v in prepared.replay.metadata.items() if k != "axes"}
    else:
        provenance = {
            "versions": report.versions(),
            "revisions": {str(m): _revision(m, trust_remote_code) for m in order},
            "parameters": _PARAMETERS.dump_python(dict(parameters), mode="json", exclude_none=True),
            "calibration_sha256": {
                str(m): c.provenance.sha256 for m, c in prepared.calibration.items()
            },
            "calibration_synthetic": [
                str(m) for m, c in prepared.calibration.items() if c.provenance.synthetic
            ],
        }
    keep(prepared.calibration, out_path)
    norms = record.corrections.norms if record.corrections else {}
    if record.corrections:
        provenance["corrections"] = record.corrections.save(out_path / CORRECTIONS_NAME)
    else:  # nor may those of an earlier merge stay
        provenance.pop("corrections", None)
        (out_path / CORRECTIONS_NAME).unlink(missing_ok=True)
    CoefficientFile(record.coefficients, tuple(sources), {**provenance, "axes": record.axes}).save(
        out_path / FILE_NAME
    )
    report.write(
        out_path / report.FILE_NAME,
        {
            **provenance,
            "sources": sources,
            "base_model": None if prepared.checked.base is None else str(prepared.checked.base),
            "replayed": prepared.replay is not None,
            "calibration": {
                str(m): dataclasses.asdict(c.provenance) for m, c in prepared.calibration.items()
            },
            "held_out_tokens": {
                str(m): prepared.run.held_out(len(c.tokens)) * c.tokens.shape[1]
                for m, c in prepared.calibration.items()
            },
            "search": [dataclasses.asdict(trial) for trial in record.trials],
            "left_out": record.left_out,
            "seconds": record.seconds,
            "peak_memory_bytes": report.peak_memory(),
            "tensors": [
                report.tensor_entry(entry, record.coefficients[name], sources, norms.get(name))
                for name, entry in record.reports.items()
            ],
        },
    )

    make_page(out_path)


def _revision(model: ModelReference, trust_remote_code: bool) -> str | None:
    """The commit from which a Hub model was loaded, or None for a local model."""
    config = model.config(trust_remote_code=trust_remote_code)
    revision: str | None = getattr(config, "_commit_hash", None) or model.model.revision
    return revision
