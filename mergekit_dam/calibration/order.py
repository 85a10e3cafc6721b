"""A seeded order that is the same on every machine and in every version of Python."""

import random


def permutation(count: int, *, seed: int) -> list[int]:
    """The numbers 0 .. count-1 in an order that follows from `seed` alone.

    Sorting by `random()` rather than `shuffle`: of the two, Python only promises that the
    former gives the same sequence for a seed in later versions.
    """
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)
