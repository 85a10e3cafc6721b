"""The descent of the end-to-end objective: steps of an optimiser on the unknowns.

1. The unknowns are coefficients and the factors of corrections. They start at a given point.
2. Each step uses the gradient on the next sequences of every model, plus that of the penalties.
3. At regular intervals the merged model is judged on held-out data. The result is the best point
   that was judged.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.search.batches import batches_of
from mergekit_dam.search.descender import Descender
from mergekit_dam.search.factors import Factors
from mergekit_dam.search.gradient import Objective
from mergekit_dam.search.judge import Verdict, verdict_of
from mergekit_dam.streams import progress
from mergekit_dam.streams.stream import Stream

LOOKS = 8
"""How often a descent is judged on held-out data, about."""


def judged_steps(steps: int) -> frozenset[int]:
    """The steps, counted from 1, after which a descent is judged: the last one is among them."""
    every = max(1, round(steps / LOOKS))
    return frozenset((*range(every, steps + 1, every), steps))


@dataclasses.dataclass(frozen=True)
class Descent:
    """The result of a descent.

    Attributes:
        record: the best coefficients that were judged.
        verdict: the verdict on them.
        steps: number of steps after which they were judged; 0 for the start.
        losses: loss of every step, on the data of the step, without penalties.
    """

    record: MergeRecord
    verdict: Verdict
    steps: int
    losses: tuple[float, ...]


@torch.enable_grad()
def descend(
    objective: Objective,
    data: Sequence[Stream],
    start: MergeRecord,
    verdict: Verdict,
    *,
    allowance: float,
    steps: int,
    column_weights: Mapping[str, Tensor],
    seed: int,
    moving: Path,
    kept: Path,
    left: float = 1.0,
) -> Descent:
    """Minimise the objective from a start.

    Args:
        objective: the objective.
        data: calibration tokens, and the hidden states that leave the teachers' last blocks.
        start: coefficients of every tensor to start from.
        verdict: verdict on the start.
        allowance: rise of one model's divergence over the start's that a point may cost.
        steps: number of steps of the optimiser.
        column_weights: weights of the weighted overlap, by tensor; empty where that is off.
        seed: seed of the order of the sequences, and of random factors.
        moving: folder for the factors of corrections while they move.
        kept: folder for a folder with the corrections of the best point.
        left: fraction of the held-out KL at the start of the search that is left.
    """
    network = objective.network
    coordinates = objective.coordinates.values()
    factors = Factors(coordinates, start.corrections, folder=moving, seed=seed)
    descender = Descender(objective, start, steps, factors, left)
    batches = batches_of(data, network.loss_weights, objective.settings.batch_size, seed)
    best, lowest, best_step = start, verdict, 0
    losses = []
    judged = judged_steps(steps)
    for step in range(1, steps + 1):
        loss = descender.step(batches, column_weights)
        losses.append(loss)
        progress.show(f"step {step}/{steps} loss {loss:.4g} held-out KL {lowest.mean:.4g}")
        if step in judged:
            with torch.no_grad():
                now = descender.point()
            seen = verdict_of(network, now, data)
            if seen.mean < lowest.mean and seen.better_than(verdict, allowance):
                if best is not start and best.corrections is not None:
                    best.corrections.discard()
                own = factors.kept(now.coefficients, kept / f"{moving.name}-{step}")
                best = dataclasses.replace(now, corrections=own)
                lowest, best_step = seen, step
    return Descent(best, lowest, best_step, tuple(losses))
