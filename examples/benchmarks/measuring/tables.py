"""Numbers, parameters and tables as Markdown that is read as it is."""

from collections.abc import Mapping, Sequence
from typing import Any


def named(parameters: Mapping[str, Any]) -> str:
    """Parameters on one line."""
    return ", ".join(f"{k}={_value(value)}" for k, value in parameters.items()) or "defaults"


def number(value: float | None, digits: int) -> str:
    """A number for the table; nothing if there is none, and no -0.000."""
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def listed(items: Mapping[str, Any]) -> str:
    """`- name: value` lines."""
    return "\n".join(f"- {name}: {value}" for name, value in items.items())


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = True
) -> str:
    """First column to the left, the others to the right, but for a last one of `prose`."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(header, *cells, strict=True)]
    last = len(header) - 1
    left = {0, last} if prose else {0}
    if prose:
        widths[last] = 3  # reasons are long; their line need not be
    rule = ["-" * widths[i] if i in left else "-" * (widths[i] - 1) + ":" for i in range(last + 1)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])
            for i, cell in enumerate(row)
        )
        return "| " + " | ".join(padded) + " |"

    return "\n".join(map(line, [header, rule, *cells]))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
