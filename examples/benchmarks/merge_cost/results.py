"""Results: medians over the rounds, ratios to `linear`, the tables, JSON and Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median
from typing import Any

from examples.benchmarks.measuring.processes import Measured
from examples.benchmarks.measuring.tables import listed, markdown_table, named, number

LINEAR = "linear"

NOTES = (
    "Every merge is a process of its own, from start to exit; a round runs all rows in turn. "
    "Numbers are medians over the rounds. A ratio is the median of the rounds' own ratios to "
    "`linear`, so that a busy machine slows both sides. All rows read the same models: where there "
    "is a base, `linear` averages it in. GB are 1e9 bytes. `GB` is the peak of resident memory, "
    "mapped files included; `own GB` is the peak without them, as seen every 20 ms. `read GB` came "
    "through calls of read, which mapped weights do not; `disk GB` came from storage, weights "
    "included, and leaves out what was in the page cache; `written GB` went through calls of write."
)
_PEAKS = {"Peak GB": "peak_bytes", "Own GB": "own_peak_bytes"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        name: name of the merge.
        parameters: the parameters of the merge.
        rounds: measurements in order; round i ran beside round i of the other rows.
        reason: why it failed, if it did; the rounds before the failure stay.
    """

    name: str
    parameters: Mapping[str, Any]
    rounds: tuple[Measured, ...] = ()
    reason: str = ""

    def of(self, what: str) -> float | None:
        """Median of a field of `Measured` over the rounds; None where it is not known."""
        known = self._known(what)
        return median(known) if known else None

    def ratio(self, what: str, linear: "Row") -> float | None:
        """Median of the rounds' ratios to `linear`; None where there is none."""
        pairs = zip(self._known(what), linear._known(what), strict=False)
        ratios = [own / other for own, other in pairs if other]
        return median(ratios) if ratios else None

    def _known(self, what: str) -> list[float]:
        values = [getattr(measured, what) for measured in self.rounds]
        return [] if None in values else values


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Merges of the same models.

    Attributes:
        case: the size that was swept and its value; empty without a sweep.
        rows: in the order of the table, `linear` first.
    """

    case: Mapping[str, int]
    rows: tuple[Row, ...]

    def table(self) -> str:
        """The rows as a Markdown table."""
        header = ["merge", "seconds", "time ratio", "GB", "memory ratio", "own GB", "read GB"]
        header += ["disk GB", "written GB", "rounds", "parameters, or why it failed"]
        return markdown_table(header, [self._cells(row) for row in self.rows])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it; unrounded."""
        return {
            "case": dict(self.case),
            "rows": [
                {
                    **asdict(row),
                    "seconds": row.of("seconds"),
                    "peak_bytes": row.of("peak_bytes"),
                    "own_peak_bytes": row.of("own_peak_bytes"),
                    "time_ratio": row.ratio("seconds", self.rows[0]),
                    "memory_ratio": row.ratio("peak_bytes", self.rows[0]),
                }
                for row in self.rows
            ],
        }

    def _cells(self, row: Row) -> list[str]:
        linear = self.rows[0]
        return [
            row.name,
            number(row.of("seconds"), 1),
            number(row.ratio("seconds", linear), 2),
            number(_giga(row.of("peak_bytes")), 2),
            number(row.ratio("peak_bytes", linear), 2),
            number(_giga(row.of("own_peak_bytes")), 2),
            *(number(_giga(row.of(f"{what}_bytes")), 3) for what in ("read", "disk", "written")),
            str(len(row.rounds) or ""),
            row.reason or named(row.parameters),
        ]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Memory of every row by a swept size.

    Attributes:
        name: name of the size.
        values: values of the size.
        peaks: bytes by kind of peak and row, one for each value; None where a row failed.
    """

    name: str
    values: tuple[int, ...]
    peaks: Mapping[str, Mapping[str, tuple[float | None, ...]]]

    def tables(self) -> Iterator[str]:
        """A table for each kind of peak, with one line per value and one column per row."""
        for kind, rows in self.peaks.items():
            lines = [
                [str(value), *(number(_giga(peaks[index]), 3) for peaks in rows.values())]
                for index, value in enumerate(self.values)
            ]
            yield f"{kind} by {self.name}:\n\n" + markdown_table(
                [self.name, *rows], lines, prose=False
            )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a run found.

    Attributes:
        comparisons: one, or one for every value of every sweep, in order.
        settings: the settings, the machine and the command; as JSON takes it.
    """

    comparisons: tuple[Comparison, ...]
    settings: Mapping[str, Any]

    def curves(self) -> Iterator[Curves]:
        """The curves of every sweep."""
        swept = [comparison for comparison in self.comparisons if comparison.case]
        for name, group in groupby(swept, key=lambda comparison: next(iter(comparison.case))):
            yield _curves(name, list(group))

    def tables(self) -> str:
        """The tables of memory of the sweeps; without a sweep, the table of the one comparison."""
        found = [table for curves in self.curves() for table in curves.tables()]
        return "\n\n".join(found or [comparison.table() for comparison in self.comparisons])

    def markdown(self, plots: Sequence[str] = ()) -> str:
        """A page: all tables, and how they were made.

        Args:
            plots: names of pictures beside the page.
        """
        parts = ["# What merges cost"]
        if swept := list(self.curves()):
            parts += ["## Memory", *(table for curves in swept for table in curves.tables())]
            parts += [f"![{plot}]({plot})" for plot in plots]
        for comparison in self.comparisons:
            if comparison.case:
                parts.append(f"## {named(comparison.case)}")
            parts.append(comparison.table())
        return "\n\n".join([*parts, NOTES, "## Run", listed(self.settings)]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it; unrounded."""
        return {
            "notes": NOTES,
            "settings": dict(self.settings),
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }


def _curves(name: str, comparisons: Sequence[Comparison]) -> Curves:
    rows = [{row.name: row for row in comparison.rows} for comparison in comparisons]
    return Curves(
        name=name,
        values=tuple(comparison.case[name] for comparison in comparisons),
        peaks={
            kind: {row: tuple(own[row].of(what) for own in rows) for row in rows[0]}
            for kind, what in _PEAKS.items()
        },
    )


def _giga(count: float | None) -> float | None:
    return None if count is None else count / 1e9
