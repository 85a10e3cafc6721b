"""Coefficients that are known before anything is fitted."""

import dataclasses
from collections.abc import Sequence

import torch

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorReport, TensorSpec
from mergekit_dam.errors import ConfigError, inside
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
