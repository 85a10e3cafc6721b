"""Elements of SVG, and how numbers are written in it."""

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

TEXT = 12
"""Size of labels, in CSS pixels."""

NAMESPACE = "http://www.w3.org/2000/svg"
"""Name of the SVG vocabulary, which files need; pages know it. Nothing is fetched from there."""

SERIES = 8
"""Colours by which models are told apart; then they come again, with broken lines."""


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; in names of attributes, `_` stands for `-`, and `class_` for `class`."""
    own = "".join(
        f" {key.rstrip('_').replace('_', '-')}={quoteattr(str(value))}"
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{own}>{content}</{name}>" if content else f"<{name}{own}/>"


def text(content: str, **attributes: object) -> str:
    """A text element."""
    return tag("text", escape(content), **attributes)


def percent(fraction: float) -> str:
    """A coordinate as a percentage of the width."""
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


def short(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def picture(content: str, *, height: float, title: str, class_: str) -> str:
    """An SVG image that is as wide as its place; a screen reader reads its title."""
    return tag(
        "svg",
        tag("title", escape(title)) + content,
        class_=class_,
        width="100%",
        height=short(height),
        role="img",
    )


def ticks(layers: Sequence[int], most: int = 10) -> list[tuple[int, int]]:
    """(position, layer) of the layers that are named below a picture."""
    fit = (s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(layers) <= most * s)
    step = next(fit, len(layers))
    return [(position, layer) for position, layer in enumerate(layers) if layer % step == 0]


def series(index: int) -> str:
    """Class of the colour of a model."""
    return f"s{index % SERIES}" + (" again" if index >= SERIES else "")
