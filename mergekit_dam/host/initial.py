"""Coefficients that are known before anything is fitted."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from mergekit.common import ModelReference

from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.merge import column_counts
from mergekit_dam.coefficients.record import Record
from mergekit_dam.coefficients.tensors import TensorPlan, TensorReport
from mergekit_dam.errors import ConfigError
from mergekit_dam.host.places import Place
from mergekit_dam.parameters import RunSettings
from mergekit_dam.search.coordinates import invert
from mergekit_dam.sources.stage import Stage


def averages(places: Sequence[Place]) -> Record:
    """The weights outside of the decoder: averaged, whatever is fitted."""
    record = Record()
    for place in places:
        if place.kind == "outside":
            name = place.plan.name
            record.coefficients[name] = place.plan.settings.parametrisation.starting_coefficients()
            record.reports[name] = TensorReport(name, "other", "averaged: outside of the decoder")
    return record


def copies(plans: Sequence[TensorPlan]) -> Record:
    """Coefficients of a merge in which every tensor is one model's."""
    record = Record()
    for plan in plans:
        record.coefficients[plan.name] = plan.settings.parametrisation.starting_coefficients()
        record.reports[plan.name] = TensorReport(plan.name, "copy", "copied: of one model alone")
    return record


def search_start(
    stages: Sequence[Stage], settings: RunSettings, outside: Record, saved: Record | None
) -> Record:
    """The coefficients that a search starts from.

    Args:
        outside: those of weights outside of the decoder.
        saved: those of an earlier merge to start from, if there is one.
    """
    if saved is not None:
        return saved
    generator = torch.Generator().manual_seed(settings.seed)
    record = dataclasses.replace(outside, coefficients=dict(outside.coefficients))
    record.reports = dict(outside.reports)
    for plan in (plan for stage in stages for plan in stage.tensors):
        form = plan.settings.parametrisation
        if settings.start == "random":
            rows = form.random_coefficients(generator)
        else:
            rows = form.starting_coefficients()
        record.coefficients[plan.name] = rows
        record.reports[plan.name] = TensorReport(plan.name, "other", "start kept")
    for stage in stages:
        for plan in stage.tensors:
            if plan.tied_to is not None:
                record.coefficients[plan.name] = record.coefficients[plan.tied_to]
    return record


def check_start(plans: Sequence[TensorPlan], start: Record, settings: RunSettings) -> None:
    """Refuse a start that the descent cannot begin at.

    Raises:
        ConfigError: the start's coefficients are of another form than those that are fitted.
    """
    if settings.objective == "layer":
        return
    for plan in plans:
        coefficients = start.coefficients[plan.name]
        if len(plan.settings.parametrisation.reached) == 1:
            continue  # copied, whatever is learned of others
        if plan.settings.granularity == "tensor" and coefficients.shape[1] > 1:
            raise ConfigError(
                [
                    f"start: the file has one coefficient a column for {plan.name}, but "
                    f"`granularity` is `tensor`; set `granularity: column`, or another start"
                ]
            )
        try:
            form = plan.settings.parametrisation
            invert(settings.logits.nonlinearity, form.unknowns(coefficients))
        except ConfigError as error:
            raise ConfigError([f"{plan.name}: {problem}" for problem in error.problems]) from None


def saved_record(
    saved: CoefficientFile,
    plans: Sequence[TensorPlan],
    order: Sequence[ModelReference],
    shapes: Mapping[str, tuple[int, ...]],
) -> Record:
    """The saved coefficients of every planned tensor, rows in the order of the sources.

    Args:
        shapes: of the tensors, where headers tell them.

    Raises:
        ConfigError: the file belongs to other models or layers.
    """
    rows = saved.rows_of([str(model) for model in order])
    axes = saved.metadata.get("axes", {})
    names = [plan.name for plan in plans]
    problems = [
        *(f"none for {name}" for name in names if name not in saved.coefficients),
        *(f"some for {name}, which is not merged" for name in saved.coefficients.keys() - names),
    ]
    for name in saved.coefficients.keys() & shapes.keys():
        columns, shape = saved.coefficients[name].shape[1], shapes[name]
        if columns not in column_counts(shape, axes.get(name, -1)):
            problems.append(f"{columns} a model for {name}, of shape {list(shape)}")
    if problems:
        raise ConfigError(
            [
                f"{saved.parameter}: the file has {', '.join(sorted(problems)[:3])}"
                f"{' and so on' if len(problems) > 3 else ''}; it belongs to another model or "
                f"another choice of layers"
            ]
        )
    return Record(
        coefficients={name: saved.coefficients[name][rows] for name in names},
        axes={name: axes[name] for name in names if axes.get(name, -1) != -1},
        reports={name: TensorReport(name, "replay", "replayed") for name in names},
    )
