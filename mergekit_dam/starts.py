"""Coefficients that are known before anything is fitted."""

import dataclasses
from collections.abc import Sequence

import torch

from mergekit_dam.errors import ConfigError
from mergekit_dam.fitting.tensors import TensorReport
from mergekit_dam.objective.nonlinearity import invert
from mergekit_dam.places import Place
from mergekit_dam.settings import RunSettings
from mergekit_dam.stage import Record, Stage, TensorPlan


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
