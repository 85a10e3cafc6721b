"""Tables and times for a terminal."""

from collections.abc import Sequence

_GAP = "  "


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Lines of a table: the first column is aligned to the left, the others to the right.

    Args:
        width: Columns of the terminal; a wider table is cut into several, below each other, that
            all begin with the first column.
    """
    every = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return "\n\n".join(
        "\n".join(_line(row, widths, columns) for row in every)
        for columns in _groups(widths, width)
    )


def _line(row: Sequence[str], widths: Sequence[int], columns: Sequence[int]) -> str:
    right = (row[column].rjust(widths[column]) for column in columns)
    return _GAP.join([row[0].ljust(widths[0]), *right]).rstrip()


def _groups(widths: Sequence[int], limit: int | None) -> list[list[int]]:
    """The columns but the first, in groups that fit beside it; at least one column each."""
    groups: list[list[int]] = [[]]
    taken = widths[0]
    for column in range(1, len(widths)):
        taken += len(_GAP) + widths[column]
        if limit is not None and taken > limit and groups[-1]:
            groups.append([])
            taken = widths[0] + len(_GAP) + widths[column]
        groups[-1].append(column)
    return groups


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in kB, MB, GB or TB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e3:.0f} kB" if count else "0"
