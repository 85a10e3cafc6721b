"""Lines over the depth of a model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergekit_dam.reports.pictures.svg import percent, picture, short, tag, text, ticks
from mergekit_dam.reports.words import signed

HEIGHT = 180
"""Height of the plot itself."""

TOP, BELOW = 16, 22
"""Room above the plot, for the highest label, and below it, for the numbers of the layers."""

LEFT = 0.05
"""Part of the width in front of the first layer, for the values of the scale."""

MOST_DOTS = 40
"""Layers up to which every value has a dot."""


@dataclass(frozen=True)
class Line:
    """A line: its class, and a value for each layer, or None."""

    class_: str
    values: Sequence[float | None]


def lines(
    own: Sequence[Line],
    layers: Sequence[int],
    title: str,
    said: Callable[[float], str] = lambda value: signed(f"{value:g}"),
) -> str:
    """Lines over the layers; the scale includes zero, and its values are `said`."""
    known = [value for line in own for value in line.values if value is not None]
    low, high, step = scale(min(known, default=0.0), max(known, default=1.0))
    count = len(layers)

    def edge(at: float) -> float:
        return LEFT + (1 - LEFT) * at / max(1, count)

    def x(position: int) -> float:
        return edge(position + 0.5)

    def y(value: float) -> float:
        return (high - value) / (high - low)

    heights = [(k * step, TOP + HEIGHT * y(k * step)) for k in _steps(low, high, step)]
    drawn = [
        tag("line", x2="100%", y1=short(at), y2=short(at), class_="grid" if value else "grid zero")
        for value, at in heights
    ]
    for position, layer in ticks(layers):
        drawn.append(
            text(str(layer), x=percent(x(position)), y=TOP + HEIGHT + 15, text_anchor="middle")
        )
    paths = [
        tag(
            "path",
            d=_path([(x(k), None if v is None else y(v)) for k, v in enumerate(line.values)]),
            class_=line.class_,
            vector_effect="non-scaling-stroke",
        )
        for line in own
    ]
    drawn.append(
        tag(
            "svg",
            "".join(paths),
            y=TOP,
            width="100%",
            height=HEIGHT,
            viewBox="0 0 100 100",
            preserveAspectRatio="none",
            class_="plot",
        )
    )
    for line in own if count <= MOST_DOTS else ():
        for k, value in enumerate(line.values):
            if value is not None:
                place = {"cx": percent(x(k)), "cy": short(TOP + HEIGHT * y(value))}
                drawn.append(tag("circle", **place, r=3, class_=f"dot {line.class_}"))
    drawn += [text(said(value), x=0, y=short(at - 4), class_="faint") for value, at in heights]
    drawn += [
        tag(
            "rect",
            class_="hit",
            x=percent(edge(k)),
            y=TOP,
            width=percent(edge(1) - edge(0)),
            height=HEIGHT,
        )
        for k in range(count)
    ]
    return picture("".join(drawn), height=TOP + HEIGHT + BELOW, title=title, class_="lines")


def scale(low: float, high: float) -> tuple[float, float, float]:
    """Round ends of a scale that includes zero, and the distance of its lines."""
    low, high = min(low, 0.0), max(high, 0.0)
    size = (high - low) or 1.0
    steps = (first * 10.0**power for power in range(-9, 31) for first in (1, 2, 2.5, 5))
    step = next(step for step in steps if size <= 4 * step)
    return step * math.floor(low / step), step * max(1, math.ceil(high / step)), step


def _steps(low: float, high: float, step: float) -> range:
    return range(round(low / step), round(high / step) + 1)


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """A path through points of the unit square, interrupted where there is no value."""
    drawn, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        drawn.append(f"{pen}{short(100 * x)} {short(100 * y)}")
        pen = "L"
    return "".join(drawn)
