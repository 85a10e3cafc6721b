"""Rows with a mark on a common scale: pairs of values, and bars."""

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_dam.reports.pictures.svg import percent, picture, tag, text

ROW = 44
"""Height of a row: its words, and its mark below them."""


@dataclass(frozen=True)
class Row:
    """A row of a picture.

    Attributes:
        name: What it is, on the left.
        said: Its values in words, on the right.
        values: The value, or the values before and after; None if unknown.
        class_: Class of its colour.
    """

    name: str
    said: str
    values: tuple[float | None, ...]
    class_: str


def pairs(rows: Sequence[Row], title: str) -> str:
    """A ring at the value before, a dot at the one after, and a line between them."""
    most = _most(rows)

    def mark(row: Row, y: int) -> str:
        before, after = row.values
        drawn = tag("line", x2="100%", y1=y, y2=y, class_="track")
        if before is None or after is None:
            return drawn
        a, b = (percent(0.01 + 0.98 * value / most) for value in (before, after))
        drawn += tag("line", x1=a, x2=b, y1=y, y2=y, class_=f"way {row.class_}")
        drawn += tag("circle", cx=a, cy=y, r=5, class_=f"ring {row.class_}")
        return drawn + tag("circle", cx=b, cy=y, r=6, class_=f"dot {row.class_}")

    return _picture(rows, [mark(row, k * ROW + 29) for k, row in enumerate(rows)], title)


def bars(rows: Sequence[Row], title: str) -> str:
    """A bar from zero for each row."""
    most = _most(rows)

    def mark(row: Row, y: int) -> str:
        (value,) = row.values
        track = tag("rect", y=y, width="100%", height=10, rx=2, class_="track")
        if value is None:
            return track
        width = percent(value / most)
        return track + tag("rect", y=y, width=width, height=10, rx=2, class_=f"bar {row.class_}")

    return _picture(rows, [mark(row, k * ROW + 22) for k, row in enumerate(rows)], title)


def _most(rows: Sequence[Row]) -> float:
    return max((v for row in rows for v in row.values if v is not None), default=0.0) or 1.0


def _picture(rows: Sequence[Row], marks: Sequence[str], title: str) -> str:
    drawn = []
    for k, (row, mark) in enumerate(zip(rows, marks, strict=True)):
        y = k * ROW
        drawn.append(text(row.name, x=0, y=y + 14, class_="name"))
        drawn.append(text(row.said, x="100%", y=y + 14, text_anchor="end"))
        drawn.append(mark)
        drawn.append(tag("rect", class_="hit", y=y, width="100%", height=ROW))
    return picture("".join(drawn), height=ROW * len(rows), title=title, class_="bars")
