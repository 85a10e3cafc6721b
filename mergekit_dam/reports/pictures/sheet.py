"""Maps as one file of their own, which a model card shows: on white, with all colours in it."""

from collections.abc import Mapping, Sequence

from mergekit_dam.reports.pictures.colours import LIGHT, colours, fills
from mergekit_dam.reports.pictures.heatmap import cells, gutter_width, height_of, labels
from mergekit_dam.reports.pictures.svg import NAMESPACE, tag, text

WIDEST = 760
"""Width that the file does not exceed, in CSS pixels."""

KEYED = 110
"""Width of a colour with its meaning."""

HEADING, MARGIN, KEY = 26, 16, 24
"""Heights of a map's heading, and of the key at the end; and the margin around all."""

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.name{font-weight:600;fill:#111}"
    ".none{fill:none}.k{fill:none;stroke:#ccc}.faint{fill:#777}"
)


def sheet(
    maps: Mapping[str, Sequence[Sequence[str]]],
    modules: Sequence[str],
    layers: Sequence[int],
    *,
    key: Sequence[tuple[str, str]],
    widest: int,
) -> str:
    """An SVG file with one map below the other.

    Args:
        maps: Heading -> class of every cell: modules, and in each the layers.
        modules: Names of the rows.
        key: (class, meaning) of some colours.
        widest: Width that a map does not exceed.
    """
    beside = gutter_width(modules)
    wide = min(widest, WIDEST - beside - 2 * MARGIN)
    width = 2 * MARGIN + max(beside + wide, KEYED * len(key))
    drawn, y = [], MARGIN
    for heading, steps in maps.items():
        drawn.append(text(heading, x=MARGIN, y=y + 12, class_="name"))
        y += HEADING
        drawn.append(tag("g", labels(modules, beside - 8), transform=f"translate({MARGIN} {y})"))
        drawn.append(
            tag(
                "svg",
                cells(steps, layers),
                x=MARGIN + beside,
                y=y,
                width=wide,
                height=height_of(len(modules)),
            )
        )
        y += height_of(len(modules)) + MARGIN
    for number, (class_, meaning) in enumerate(key):
        x = MARGIN + KEYED * number
        drawn.append(tag("rect", x=x, y=y, width=16, height=12, class_=class_))
        drawn.append(text(meaning, x=x + 22, y=y + 10))
    height = y + KEY + MARGIN
    whole = tag("style", STYLE + fills(colours(LIGHT))) + tag(
        "rect", width=width, height=height, fill="#fff"
    )
    return tag(
        "svg",
        tag("title", "Mean coefficient of each model by module and layer") + whole + "".join(drawn),
        xmlns=NAMESPACE,
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        role="img",
    )
