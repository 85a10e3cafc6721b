"""The order in which a descent sees the calibration sequences."""

from collections.abc import Iterator, Sequence

import torch

from mergekit_dam.search.gradient import Batch
from mergekit_dam.streams.stream import Stream


def batches_of(
    data: Sequence[Stream], loss_weights: Sequence[float], size: int, seed: int
) -> Iterator[list[Batch]]:
    """Batches without end: the sequences of the fit in random order, again and again.

    The order is the same in all processes; each process gets its own sequences of a batch.

    Args:
        data: calibration tokens, and the hidden states that leave the teachers' last blocks.
        loss_weights: weight of each source's data.
        size: sequences per model in a batch; fewer if the model has fewer.
        seed: seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    fit = [own.of("fit") for own in data]
    queues: list[list[int]] = [[] for _ in fit]
    while True:
        batch = []
        for own, queue in zip(fit, queues, strict=True):
            count = own.share.count("fit")
            wanted = min(size, count)
            if len(queue) < wanted:
                queue.extend(torch.randperm(count, generator=generator).tolist())
            chosen = [queue.pop(0) for _ in range(wanted)]
            rows = [row for number in chosen if (row := own.share.row_of(number)) is not None]
            at_hand = torch.tensor(rows, dtype=torch.int64)
            weight, tokens = loss_weights[own.source], own.merged[at_hand]
            batch.append(Batch(own.source, weight, tokens, own.teacher[at_hand], wanted))
        yield batch
