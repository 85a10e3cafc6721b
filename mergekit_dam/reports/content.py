"""What a page consists of: sections with sentences, pictures and tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["cells", "rows"]
"""What a reader points at: cells of a map, or rows of the table (a layer, a model, a trial)."""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows.

    Attributes:
        caption: What it shows.
        head: Names of the columns.
        rows: Cells as text, as many as the head has.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture, and the table that holds its numbers.

    The script takes what it says about a cell or row from the table: row k of a map is column
    k + 1 there, and its columns are the table's rows.

    Attributes:
        name: Its identity on the page.
        label: Heading, and name for screen readers.
        svg: The picture.
        gutter: Names of the rows of a map, as SVG.
        legend: (class of a colour, its meaning).
        widest: Width in CSS pixels that it does not exceed; 0 for all the width there is.
        beside: Width of the gutter.
    """

    name: str
    label: str
    svg: str
    table: Table
    mode: Mode
    gutter: str = ""
    legend: Sequence[tuple[str, str]] = ()
    widest: int = 0
    beside: int = 0

    @property
    def least(self) -> int:
        """Width in CSS pixels that it asks for, beside other pictures."""
        return self.widest + self.beside


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: Its anchor.
        said: Sentences that say what its pictures show.
        legend: (class of a colour, its meaning), for all pictures.
        notes: Sentences in small print, below the pictures.
        tables: Tables that are shown as they are.
    """

    name: str
    title: str
    said: Sequence[str]
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    legend: Sequence[tuple[str, str]] = ()
