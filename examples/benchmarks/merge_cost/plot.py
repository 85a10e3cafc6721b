"""Peak memory against the swept size, as a picture; matplotlib is an extra of the package."""

from importlib.util import find_spec
from pathlib import Path

from examples.benchmarks.merge_cost.results import Curves

_LINES = ("-", "--", ":")


def available() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw(curves: Curves, file: Path) -> None:
    """Draw a line for every row and kind of peak, in GB of 1e9 bytes from 0 on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (kind, rows), line in zip(curves.peaks.items(), _LINES, strict=False):
        for number, (row, peaks) in enumerate(rows.items()):
            known = [(x, y) for x, y in zip(curves.values, peaks, strict=True) if y is not None]
            axes.plot(
                [x for x, _ in known],
                [y / 1e9 for _, y in known],
                line,
                color=f"C{number}",
                marker=".",
                label=f"{row}, {kind}",
            )
    axes.set_xlabel(curves.name)
    axes.set_ylabel("GB")
    axes.set_xticks(curves.values)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=150)
