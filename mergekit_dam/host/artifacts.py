"""The files that a dam merge writes beside the merged model: coefficients and a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.config import ParameterSetting
from pydantic import TypeAdapter

from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME, CoefficientFile
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.host import report
from mergekit_dam.host.identities import identities, revision_of
from mergekit_dam.host.merge import Merge, Tensors
from mergekit_dam.host.misfits import misfits, text_losses
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.host.resolved import resolved_parameters
from mergekit_dam.host.synthetic import keep
from mergekit_dam.reports.page import make_page

_PARAMETERS = TypeAdapter(dict[str, ParameterSetting])
"""Converts parameters to plain values: a parsed filter is an object that JSON cannot hold."""


def write_artifacts(merge: Merge, tensors: Tensors, record: MergeRecord) -> None:
    """Write coefficients, a report, corrections if there are any, and text that models wrote."""
    prepared, out_path = merge.prepared, merge.out_path
    names, base = prepared.names, prepared.checked.base
    sources = [names.of(model) for model in tensors.order]
    provenance = _provenance(merge, tensors, sources)
    kept = keep(prepared.calibration, out_path)
    norms = record.corrections.norms if record.corrections else {}
    losses = text_losses(prepared, record)
    misfit = misfits(prepared, losses, merge.config.get_text_config().vocab_size)
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
            "base_model": None if base is None else names.of(base),
            "replayed": prepared.replay is not None,
            "calibration": names.tree(
                {
                    str(model): {
                        **own.provenance.told(),
                        "warnings": [*own.provenance.warnings, *misfit.get(model, ())],
                        **({"kept": kept[model]} if model in kept else {}),
                    }
                    for model, own in prepared.calibration.items()
                }
            ),
            "held_out_tokens": {
                names.of(model): own.number_counted(prepared.run.held_out(len(own.tokens)))
                for model, own in prepared.calibration.items()
            },
            "text_losses": {names.of(model): own for model, own in losses.items()},
            "search": [report.trial_entry(trial) for trial in record.trials],
            "left_out": names.tree(record.left_out),
            "tensors": [
                report.tensor_entry(entry, record.coefficients[name], sources, norms.get(name))
                for name, entry in record.reports.items()
            ],
            "this_run": report.this_run(record),
        },
    )
    make_page(out_path)


def _provenance(merge: Merge, tensors: Tensors, sources: Sequence[str]) -> dict[str, Any]:
    """What the coefficients were made from; a replay keeps what its file says of the fit."""
    prepared = merge.prepared
    names, order = prepared.names, tensors.order
    weights = identities(order, names)
    own = {"identities": {model.name: dict(model.files) for model in weights.values()}}
    if prepared.replay is not None:
        return {**_renamed(prepared, sources), **own}
    return {
        **own,
        "versions": report.versions(),
        "revisions": {names.of(model): revision_of(model.model) for model in order},
        "parameters": names.tree(
            _PARAMETERS.dump_python(dict(merge.parameters), mode="json", exclude_none=True)
        ),
        "resolved_parameters": resolved_parameters(merge, tensors),
        "calibration_sha256": {
            names.of(model): own.provenance.sha256 for model, own in prepared.calibration.items()
        },
        "calibration_synthetic": [
            names.of(model)
            for model, own in prepared.calibration.items()
            if own.provenance.synthetic
        ],
    }


def _renamed(prepared: Prepared, sources: Sequence[str]) -> dict[str, Any]:
    """What a file says of its fit, with the names that its models have now."""
    assert prepared.replay is not None
    now = dict(zip(prepared.replay.sources, sources, strict=True))

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return now.get(value, value)
        if isinstance(value, Mapping):
            return {renamed(key): renamed(entry) for key, entry in value.items()}
        return [renamed(entry) for entry in value] if isinstance(value, list) else value

    return {key: renamed(v) for key, v in prepared.replay.metadata.items() if key != "axes"}
