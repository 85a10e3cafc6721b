"""The order in which a descent sees the calibration sequences."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from mergekit_dam.search.gradient import Batch
from mergekit_dam.streams.stream import Stream


def batches_of(
    data: Sequence[Stream],
    loss_weights: Sequence[float],
    size: int,
    seed: int,
    *,
    taken: int = 0,
) -> Iterator[list[Batch]]:
    """Batches without end: the sequences of the fit in random order, again and again.

    The order is the same in all processes; each process gets its own sequences of a batch.

    Args:
        data: calibration tokens, and the hidden states that leave the teachers' last blocks.
        loss_weights: weight of each source's data.
        size: sequences per model in a batch; fewer if the model has fewer.
        seed: seed of the order.
        taken: number of batches that an earlier run has taken already.
    """
    fit = [own.of("fit") for own in data]
    counts = [own.share.count("fit") for own in fit]
    for chosen in itertools.islice(_numbers(counts, size, seed), taken, None):
        batch = []
        for own, numbers in zip(fit, chosen, strict=True):
            rows = [row for number in numbers if (row := own.share.row_of(number)) is not None]
            at_hand = torch.tensor(rows, dtype=torch.int64)
            batch.append(
                Batch(
                    own.source,
                    loss_weights[own.source],
                    own.merged[at_hand],
                    own.teacher[at_hand],
                    len(numbers),
                    None if own.weights is None else own.weights[at_hand],
                )
            )
        yield batch


def _numbers(counts: Sequence[int], size: int, seed: int) -> Iterator[list[list[int]]]:
    """The numbers of every model's sequences in one batch after the other, without end."""
    generator = torch.Generator().manual_seed(seed)
    queues: list[list[int]] = [[] for _ in counts]
    while True:
        chosen = []
        for count, queue in zip(counts, queues, strict=True):
            wanted = min(size, count)
            if len(queue) < wanted:
                queue.extend(torch.randperm(count, generator=generator).tolist())
            chosen.append([queue.pop(0) for _ in range(wanted)])
        yield chosen
