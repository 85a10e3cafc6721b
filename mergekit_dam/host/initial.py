"""Coefficients that are known before anything is fitted."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from mergekit.common import ModelReference

from mergekit_dam.coefficients.correction import Corrections
from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.merge import column_problem
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorReport, TensorSpec
from mergekit_dam.errors import ConfigError, inside, listed
from mergekit_dam.host.places import PlacedTensor
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.coordinates import invert
from mergekit_dam.sources.stage import Stage


def averages(tensors: Sequence[PlacedTensor]) -> MergeRecord:
    """The record of the weights outside of the decoder, which are always averaged."""
    record = MergeRecord()
    for placed in tensors:
        if placed.kind == "outside":
            name = placed.spec.name
            record.coefficients[name] = placed.spec.settings.parametrisation.starting_coefficients()
            record.reports[name] = TensorReport(name, "other", "averaged: outside of the decoder")
    return record


def copies(specs: Sequence[TensorSpec]) -> MergeRecord:
    """The record of a merge in which every tensor is a copy of one model's."""
    record = MergeRecord()
    for spec in specs:
        record.coefficients[spec.name] = spec.settings.parametrisation.starting_coefficients()
        record.reports[spec.name] = TensorReport(spec.name, "copy", "copied: of one model alone")
    return record


def search_start(
    stages: Sequence[Stage],
    settings: RunParameters,
    outside: MergeRecord,
    saved: MergeRecord | None,
) -> MergeRecord:
    """The coefficients that a search starts from.

    Args:
        stages: the stages of the model.
        settings: parameters of the merge.
        outside: record of the weights outside of the decoder.
        saved: record of an earlier merge to start from, if one is configured.
    """
    if saved is not None:
        return saved
    generator = torch.Generator().manual_seed(settings.random_seed)
    record = dataclasses.replace(outside, coefficients=dict(outside.coefficients))
    record.reports = dict(outside.reports)
    for spec in (spec for stage in stages for spec in stage.tensors):
        form = spec.settings.parametrisation
        if settings.start == "random":
            rows = form.random_coefficients(generator)
        else:
            rows = form.starting_coefficients()
        record.coefficients[spec.name] = rows
        record.reports[spec.name] = TensorReport(spec.name, "other", "start kept")
    for stage in stages:
        for spec in stage.tensors:
            if spec.tied_to is not None:
                record.coefficients[spec.name] = record.coefficients[spec.tied_to]
    return record


def check_start(specs: Sequence[TensorSpec], start: MergeRecord, settings: RunParameters) -> None:
    """Refuse a start from which the descent cannot begin.

    Raises:
        ConfigError: the start's coefficients do not have the form of those that are fitted.
    """
    if settings.objective == "layer":
        return
    for spec in specs:
        coefficients = start.coefficients[spec.name]
        if len(spec.settings.parametrisation.reached) == 1:
            continue  # copied: its coefficients are not learned
        if spec.settings.granularity == "tensor" and coefficients.shape[1] > 1:
            raise ConfigError(
                f"start: the file has one coefficient per column for {spec.name}, but "
                f"`granularity` is `tensor`; set `granularity: column`, or another start"
            )
        with inside(spec.name):
            form = spec.settings.parametrisation
            invert(settings.nonlinearity, form.unknowns(coefficients))


def saved_record(
    saved: CoefficientFile,
    specs: Sequence[TensorSpec],
    order: Sequence[ModelReference],
    shapes: Mapping[str, tuple[int, ...]],
) -> MergeRecord:
    """The saved coefficients of every planned tensor, rows in the order of the sources.

    Args:
        saved: the file of coefficients.
        specs: the planned tensors.
        order: the sources.
        shapes: shapes of the tensors, where headers give them.

    Raises:
        ConfigError: the file belongs to other models or layers.
    """
    rows = saved.rows_of([str(model) for model in order])
    axes = saved.metadata.get("axes", {})
    names = [spec.name for spec in specs]
    problems = [
        *(f"none for {name}" for name in names if name not in saved.coefficients),
        *(f"some for {name}, which is not merged" for name in saved.coefficients.keys() - names),
    ]
    for name in saved.coefficients.keys() & shapes.keys():
        columns, shape = saved.coefficients[name].shape[1], shapes[name]
        if column_problem(columns, shape, axes.get(name, -1)):
            problems.append(f"{columns} per source for {name}, of shape {list(shape)}")
    if problems:
        raise ConfigError(
            f"{saved.parameter}: the file has {listed(sorted(problems))}; "
            f"it belongs to another model or "
            f"another choice of layers"
        )
    return MergeRecord(
        coefficients={name: saved.coefficients[name][rows] for name in names},
        axes={name: axes[name] for name in names if axes.get(name, -1) != -1},
        reports={name: TensorReport(name, "replay", "replayed") for name in names},
        corrections=None if saved.corrections is None else Corrections.of_file(saved.corrections),
    )
