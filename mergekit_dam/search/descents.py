"""The descents of a search: a short one, and a long one if the short one was worthwhile."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from mergekit_dam.interrupts import first_one_asks
from mergekit_dam.journal import Journal
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.best import DESCENT, Best
from mergekit_dam.search.coordinates import Coordinate, coordinates_of
from mergekit_dam.search.descend import Kind, descend
from mergekit_dam.search.gradient import Objective
from mergekit_dam.search.pace import Pace
from mergekit_dam.search.regularisers import column_weights
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams import distributed, progress
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.stream import Stream

LOG = logging.getLogger(__name__)

DESCENTS = (20, 400)
"""Steps of each descent where no number is configured: the first is a trial of whether it pays."""

ENOUGH = 0.05
"""Without a configured number of steps, there is no descent where layer fits left a smaller
fraction of the start's held-out KL than this: its steps cost more than such a rest is worth."""

WORTHWHILE = 0.01
"""A longer descent follows if the one before lowered the held-out KL by this fraction."""


def descents(asked: int | None) -> tuple[int, ...]:
    """Steps of the descents that may be run, one after the other.

    Args:
        asked: the number of steps that the configuration asks for, if it does.
    """
    return DESCENTS if asked is None else (asked,)


def descents_from(
    network: Network,
    settings: RunParameters,
    best: Best,
    data: Sequence[Stream],
    boundaries: BoundaryStates,
    pace: Pace,
    journal: Journal,
) -> None:
    """Descend the end-to-end objective from the best so far, as long as it is worthwhile.

    Descents that are among the trials, since an earlier run has made them, are not repeated.
    """
    planned, further = descents(settings.steps), _further(settings, best)
    if not further:
        return
    coordinates, weights = _coordinates(network, settings, data)
    if not coordinates:
        return
    objective = Objective(network, coordinates, settings, boundaries)
    with interruptible() as interrupted:
        for number in further:
            steps = planned[number]
            if number and (not best.paid(WORTHWHILE) or interrupted()):
                break
            # A longer descent that has no more steps than the one before would find nothing new.
            taken = int(best.trials[-1].details["steps"]) if number else 0
            if not pace.allows(f"a descent of {steps} steps", pace.cost(taken + 1)):
                break
            started, name = time.perf_counter(), f"descent-{number}"
            with journal.room(f"{name}-moving", lasting=False) as moving:
                ended = descend(
                    objective,
                    data,
                    best.record,
                    best.verdict,
                    allowance=best.allowance,
                    steps=steps,
                    column_weights=weights,
                    seed=settings.random_seed + number,
                    moving=moving,
                    journal=journal,
                    name=name,
                    left=best.left,
                    kind=_kind(settings, number),
                    pace=pace,
                    interrupted=interrupted,
                )
            taken = len(ended.losses)
            said = {"steps": taken, "best_step": ended.steps}
            trial = f"{DESCENT}, {steps} steps"
            best.consider(trial, ended.record, ended.verdict, started, ended=ended.ended, **said)
            journal.drop(name)
            if ended.ended:
                progress.say(f"{ended.ended} ended the descent after {taken} of {steps} steps")


def _kind(settings: RunParameters, number: int) -> Kind:
    if settings.steps is not None:
        return "asked for"
    return "further" if number else "trial"


def _further(settings: RunParameters, best: Best) -> range:
    """Numbers of the descents that may follow what was tried so far."""
    if best.descents:  # by an earlier run
        return range(best.descents, len(descents(settings.steps)) if best.paid(WORTHWHILE) else 0)
    if settings.objective != "logits" and settings.steps is None and best.left < ENOUGH:
        LOG.info("no descent: layer fits left %.0f %% of the start's KL", 100 * best.left)
        return range(0)
    return range(len(descents(settings.steps)))


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let an interrupt end descents, and not the merge; how, is said before and then.

    Of several processes, torchrun ends all at the first.
    """
    if distributed.size() > 1:
        yield lambda: False
        return
    with first_one_asks(
        "The descent ends after this step; then the best point so far is written. "
        "Ctrl-C once more ends the merge without writing it.",
        progress.urge,
    ) as interrupted:
        progress.say("descending; ctrl-C ends the descent, and writes the best point so far")
        yield interrupted


def _coordinates(
    network: Network, settings: RunParameters, data: Sequence[Stream]
) -> tuple[dict[str, Coordinate], dict[str, Tensor]]:
    """The fitted tensors of all stages, and their column weights where the overlap needs them."""
    found: dict[str, Coordinate] = {}
    weights: dict[str, Tensor] = {}
    head = network.stages[0].models.output.head_name
    for number, opened in network.all():
        last = number == len(network.stages) - 1
        like = data[0].merged[:1] if number == 0 else data[0].teacher[:1]
        anatomy = opened.anatomy(like.to(network.device))
        for coordinate in coordinates_of(opened, anatomy, head if last else None):
            found[coordinate.name] = coordinate
            if settings.weighted_overlap and coordinate.kind == "linear":
                weights[coordinate.name] = _column_weights(opened, coordinate)
    return found, weights


def _column_weights(opened: OpenStage, coordinate: Coordinate) -> Tensor:
    tensors, base = opened.by_name(coordinate.name).on(opened.device).tensors, coordinate.form.base
    assert base is not None  # else the configuration was refused
    models = [tensors[source] for source in coordinate.form.merged]
    return column_weights(models, tensors[base], axis=coordinate.axis)
