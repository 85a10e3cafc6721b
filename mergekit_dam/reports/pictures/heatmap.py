"""Maps of modules by layers: a row of cells for each module."""

from collections.abc import Sequence

from mergekit_dam.reports.pictures.colours import STEPS
from mergekit_dam.reports.pictures.svg import TEXT, percent, picture, tag, text, ticks

ROW = 16
"""Height of a row of cells."""

AXIS = 20
"""Height of the numbers of the layers."""

GAP = 0.06
"""Part of a cell's width that is left between cells."""


def step_of(value: float | None, most: float) -> str:
    """Class of a value's colour: `n8` to `n1` below zero, `z`, `p1` to `p8`; `none` of none.

    Args:
        most: Value of the strongest colour.
    """
    if value is None:
        return "none"
    step = max(-STEPS, min(STEPS, round(value / most * STEPS))) if most else 0
    return "z" if step == 0 else f"{'p' if step > 0 else 'n'}{abs(step)}"


def most_of(largest: float) -> float:
    """A round number that is at least as large: the end of a scale."""
    for power in range(-6, 7):
        for first in (1, 1.5, 2, 3, 5, 7.5):
            if largest <= (end := first * 10.0**power):
                return end
    return largest


def cells(steps: Sequence[Sequence[str]], layers: Sequence[int]) -> str:
    """The cells, row by row, and the numbers of the layers below.

    Args:
        steps: Class of every cell: modules, and in each the layers.
    """
    width = 1 / max(1, len(layers))
    rows = [
        tag(
            "g",
            "".join(
                tag(
                    "rect",
                    class_=step,
                    x=percent(column * width),
                    width=percent(width * (1 - GAP)),
                    height=ROW - 2,
                )
                for column, step in enumerate(own)
            ),
            transform=f"translate(0 {row * ROW})" if row else None,
        )
        for row, own in enumerate(steps)
    ]
    numbers = [
        text(
            str(layer),
            x=percent((position + 0.5) * width),
            y=len(steps) * ROW + AXIS - 6,
            text_anchor="middle",
        )
        for position, layer in ticks(layers)
    ]
    return "".join(rows) + "".join(numbers)


def labels(modules: Sequence[str], x: int) -> str:
    """The names of the rows, which end at x."""
    return "".join(
        text(module, x=x, y=row * ROW + TEXT - 1, text_anchor="end")
        for row, module in enumerate(modules)
    ) + text("layer", x=x, y=len(modules) * ROW + AXIS - 6, text_anchor="end", class_="faint")


def height_of(rows: int) -> int:
    """Height of a map."""
    return rows * ROW + AXIS


def heatmap(steps: Sequence[Sequence[str]], layers: Sequence[int], title: str) -> str:
    """A map without the names of its rows, which stand beside it."""
    return picture(cells(steps, layers), height=height_of(len(steps)), title=title, class_="cells")


def gutter(modules: Sequence[str], width: int) -> str:
    """The names of the rows, beside a map."""
    return tag(
        "svg",
        labels(modules, width - 8),
        class_="gutter",
        width=width,
        height=height_of(len(modules)),
        aria_hidden="true",
    )


def gutter_width(modules: Sequence[str]) -> int:
    """Width in CSS pixels in which the names of the rows fit."""
    return 20 + round(0.56 * TEXT * max((len(module) for module in modules), default=0))
