"""The rows of the table: every method with the points of its grid, as something to run.

Grids are small on purpose. Weights of task vectors are multiples of 1/N, where N is the number of
models: weights of 1/N give the plain average.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.benchmarks.measuring.merges import Point
from examples.benchmarks.measuring.selection import chosen, refuse_repeated
from examples.benchmarks.merge_quality.results import BASE, LINEAR, OWN

REGMEAN = "regmean"

# arcee-ai/DAM: what its code trains with unless told otherwise. Its tanh is always on, and its
# embeddings and norms are left as averages, whatever its flags say.
_REFERENCE = {
    "objective": "logits",
    "temperature": 2.0,
    "similarity": 0.01,
    "optimizer": "mofo",
    "mofo_fraction": 0.3,
    "learning_rate": 1e-3,
    "lr_schedule": "constant",
    "max_grad_norm": 1.0,
    "nonlinearity": "tanh",
    "sum_to_one": False,
    "embeddings": False,
    "norms": False,
}
_END_TO_END = {"objective": "logits"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table, with the points of which the best is reported."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The rows that a user asks for.

    Attributes:
        variants: further rows of `dam`, by name, with the parameters that they set.
        reference_steps: steps of the end-to-end objectives; by default one pass over the samples.
        only, skip: names of rows, with `*` for any letters.
    """

    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference_steps: int | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


def select(choices: Choices, *, count: int, has_base: bool, samples: int) -> tuple[Method, ...]:
    """The methods to run, `linear` first, for `count` models.

    Raises:
        DamError: if a name is taken twice, or selects nothing.
    """
    methods = (
        *_stock(count, has_base=has_base),
        _regmean(),
        *_end_to_end(samples, choices.reference_steps),
        Method(name="dam", points=(Point(method="dam"),)),
        *(
            Method(name=name, points=(Point(method="dam", parameters=parameters),))
            for name, parameters in choices.variants.items()
        ),
    )
    names = [method.name for method in methods]
    refuse_repeated(names, taken=(BASE, OWN))
    wanted = chosen(names, only=choices.only, skip=choices.skip, always=(LINEAR,))
    return tuple(method for method in methods if method.name in wanted)


def _stock(count: int, *, has_base: bool) -> Iterator[Method]:
    """The methods of mergekit that merge any number of models without training."""
    equal = (1.0,) * count
    yield _method(LINEAR, [Point(method="linear", weights=equal, base="none")])
    if count > 1:
        weights = [tuple(2.0 if k == i else 1.0 for k in range(count)) for i in range(count)]
        yield _method(
            "linear_weighted",
            [Point(method="linear", weights=own, base="none") for own in weights],
        )
    if count == 2:
        ts = [{"t": t} for t in (0.3, 0.5, 0.7)]
        yield _method("slerp", [Point(method="slerp", parameters=t, base="first") for t in ts])
        yield _method("nuslerp", [Point(method="nuslerp", weights=equal)])
    yield _method("multislerp", [Point(method="multislerp", weights=equal)])
    yield _method("karcher", [Point(method="karcher", base="none")])
    if not has_base:
        return
    yield _method("model_stock", [Point(method="model_stock")])
    yield _method("sce", _grid("sce", count, select_topk=(0.1, 1.0)))
    yield _method("task_arithmetic", _grid("task_arithmetic", count, (0.8, 1.25, 1.75, 2.5)))
    yield _method(
        "ties",
        [
            *_grid("ties", count, (0.8, 1.5, 3.0), density=(0.5,), normalize=(False,)),
            *_grid("ties", count, (3.0,), density=(1.0,), normalize=(True,)),
        ],
    )
    yield _method("dare_linear", _grid("dare_linear", count, (0.8, 1.75), density=(0.5, 0.9)))
    yield _method("dare_ties", _grid("dare_ties", count, (0.8, 1.75), density=(0.5, 0.9)))
    yield _method("della", _grid("della", count, (3.0,), density=(0.7,), **{"lambda": (0.4, 0.8)}))
    yield _method("breadcrumbs", _grid("breadcrumbs", count, (0.8, 1.5), density=(0.9,)))


def _regmean() -> Method:
    points = [Point(method=REGMEAN, parameters={"alpha": alpha}) for alpha in (0.5, 0.9)]
    return _method(REGMEAN, points)


def _end_to_end(samples: int, steps: int | None) -> Iterator[Method]:
    """The reference recipe, and our descent; a step takes one sequence per model."""
    count = {"steps": steps or samples, "batch_size": 1}
    for name, settings in (("reference", _REFERENCE), ("end_to_end", _END_TO_END)):
        yield _method(name, [Point(method="dam", parameters={**settings, **count})])


def _method(name: str, points: Sequence[Point]) -> Method:
    return Method(name=name, points=tuple(points))


def _grid(
    method: str, count: int, shares: Sequence[float] = (), /, **values: Sequence[Any]
) -> list[Point]:
    """All combinations of weights, as multiples of 1/count, and parameters."""
    weights = [(round(share / count, 4),) * count for share in shares] or [()]
    parameters = [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]
    return [
        Point(method=method, weights=own, parameters=chosen)
        for own, chosen in itertools.product(weights, parameters)
    ]
