"""Sections about layers and modules: coefficients, and the size of corrections."""

from collections.abc import Mapping, Sequence

from mergekit_dam.reports.content import Picture, Section, Table
from mergekit_dam.reports.depth import (
    Cell,
    Grid,
    Rows,
    coefficient_map,
    corrected_modules,
    correction_map,
    mean_by_layer,
    quantile,
)
from mergekit_dam.reports.names import module_labels
from mergekit_dam.reports.pictures.colours import STEPS
from mergekit_dam.reports.pictures.heatmap import (
    gutter,
    gutter_width,
    heatmap,
    most_of,
    step_of,
)
from mergekit_dam.reports.pictures.lines import Line, lines
from mergekit_dam.reports.pictures.svg import series
from mergekit_dam.reports.schema import DamReport, Spread
from mergekit_dam.reports.summary import reason_of
from mergekit_dam.reports.words import fixed, number, percent_of, plural, signed

WIDEST = 46
"""Width in CSS pixels that the cells of a layer do not exceed."""

STRONG = 0.95
"""Part of all values that lie within the scale of a map; the others have its strongest colour."""


def coefficients(report: DamReport, grid: Grid) -> Section | None:
    """A map of the coefficients of every model."""
    if not grid.layers:
        return None
    names = report.names
    maps = coefficient_map(report, grid)
    end = scale_end(report, maps)
    return Section(
        "coefficients",
        "Coefficients",
        [
            "How much of each model went into each module of each layer: the mean of its "
            "coefficients over the columns of the weight. Blue is above zero, orange below, and "
            "pale cells make no use of the model. Point at a cell to see how far the columns "
            "spread. A base is often below zero: coefficients sum to one, and the merge goes "
            "further along the models' changes than their average does.",
        ],
        [
            Picture(
                name=f"map-{k}",
                label=label_of(report, source, names),
                svg=heatmap(
                    steps_of(maps[source], end), grid.layers, f"Coefficients of {names[source]}"
                ),
                table=_map_table(maps[source], grid, names[source]),
                mode="cells",
                gutter=gutter(labels_of(grid), gutter_width(labels_of(grid))),
                beside=gutter_width(labels_of(grid)),
                widest=WIDEST * len(grid.layers),
            )
            for k, source in enumerate(report.sources)
        ],
        tables=[_outside(report, grid, names)] if grid.outside else [],
        legend=_legend(end, kept=bool(_reasons(maps))),
        notes=[
            *([f"Outlined cells keep the average: {why}."] if (why := _reasons(maps)) else []),
            "Layers are numbered from 0, as in `layer_range`.",
            *(
                [f"Not shown: {plural(others, 'tensor')} of other parts, such as a vision tower."]
                if (others := len(grid.elsewhere))
                else []
            ),
        ],
    )


def key_of(end: float) -> list[tuple[str, str]]:
    """(class, meaning) of colours of a map: the ends of the scale, zero, and halves."""
    half = STEPS // 2
    return [
        (f"n{STEPS}", f"{_plain(-end)} or less"),
        (f"n{half}", _plain(-end / 2)),
        ("z", "0"),
        (f"p{half}", _plain(end / 2)),
        (f"p{STEPS}", f"{_plain(end)} or more"),
    ]


def _plain(value: float) -> str:
    return signed(f"{value:g}")


def _legend(end: float, *, kept: bool) -> list[tuple[str, str]]:
    shown = [(f"cell {step}", meaning) for step, meaning in key_of(end)]
    return [*shown, *([("cell k", "keeps the average")] if kept else [])]


def label_of(report: DamReport, source: str, names: Mapping[str, str]) -> str:
    """The heading of a source's map."""
    name = names[source]
    return f"{name} (base, takes the remainder)" if report.is_remainder(source) else name


def labels_of(grid: Grid) -> list[str]:
    """Names of the modules beside a picture."""
    labels = module_labels(grid.modules)
    return [labels[module] for module in grid.modules]


def scale_end(report: DamReport, maps: Mapping[str, Rows]) -> float:
    """The value of the strongest colour of all maps; a base's remainders are not asked."""
    values = (
        abs(cell.spread.mean)
        for source, rows in maps.items()
        if not report.is_remainder(source)
        for row in rows
        for cell in row
        if cell is not None
    )
    return most_of(quantile(values, STRONG)) or 1.0


def steps_of(rows: Rows, end: float) -> list[list[str]]:
    """Class of every cell; one that keeps the average is outlined."""
    return [
        [
            "none" if cell is None else step_of(cell.spread.mean, end) + (" k" if cell.kept else "")
            for cell in row
        ]
        for row in rows
    ]


def _reasons(maps: Mapping[str, Rows]) -> str:
    rows = next(iter(maps.values()))
    kept = {cell.kept for row in rows for cell in row if cell is not None and cell.kept}
    return "; ".join(sorted({reason_of(outcome) for outcome in kept}))


def _map_table(rows: Rows, grid: Grid, name: str) -> Table:
    columns = [[_told(cell) for cell in row] for row in rows]
    return Table(
        f"Coefficients of {name}: mean ± standard deviation (smallest to largest)",
        ["layer", *grid.modules],
        [[str(layer), *(column[k] for column in columns)] for k, layer in enumerate(grid.layers)],
    )


def _told(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{fixed(cell.spread.mean)}, average" if cell.kept else spread_told(cell.spread)


def spread_told(own: Spread) -> str:
    """A mean and how far the columns spread."""
    if own.min == own.max:
        return fixed(own.mean)
    std = "" if own.std is None else f" ± {fixed(own.std)}"
    return f"{fixed(own.mean)}{std} ({fixed(own.min)} to {fixed(own.max)})"


def _outside(report: DamReport, grid: Grid, names: Mapping[str, str]) -> Table:
    return Table(
        "Tensors outside of the layers",
        ["tensor", "coefficients are", *(names[source] for source in report.sources)],
        [
            [
                tensor.name,
                "learned" if tensor.learned else f"the average: {reason_of(tensor.outcome)}",
                *(
                    spread_told(tensor.coefficients[source])
                    if source in tensor.coefficients
                    else ""
                    for source in report.sources
                ),
            ]
            for tensor in grid.outside
        ],
    )


def by_depth(report: DamReport, grid: Grid) -> Section | None:
    """Mean coefficient of each model over the depth."""
    names = report.names
    means = {s: mean_by_layer(rows) for s, rows in coefficient_map(report, grid).items()}
    if len(grid.layers) < 2 or not any(v is not None for own in means.values() for v in own):
        return None
    drawn = [Line(_colour(report, k), means[s]) for k, s in enumerate(report.sources)]
    return Section(
        "depth",
        "Who leads where",
        ["The mean coefficient of each model in each layer, over the modules that were learned."],
        [
            Picture(
                name="lines",
                label="Mean coefficient by layer",
                svg=lines(drawn, grid.layers, "Mean coefficient of each model by layer"),
                table=Table(
                    "Mean coefficient by layer",
                    ["layer", *(names[source] for source in report.sources)],
                    _by_layer(grid.layers, list(means.values())),
                ),
                mode="rows",
                legend=[
                    (f"line {line.class_}", label_of(report, source, names))
                    for line, source in zip(drawn, report.sources, strict=True)
                ],
            )
        ],
    )


def _colour(report: DamReport, number: int) -> str:
    """Class of the colour of a source: a base that takes the remainder is grey."""
    return "base" if report.is_remainder(report.sources[number]) else series(number)


def _by_layer(layers: Sequence[int], columns: Sequence[Sequence[float | None]]) -> list[list[str]]:
    return [
        [str(layer), *(number(column[k]) for column in columns)] for k, layer in enumerate(layers)
    ]


def corrections(grid: Grid) -> Section | None:
    """Size of the correction relative to the weight."""
    shares, modules = correction_map(grid), corrected_modules(grid)
    if not modules:
        return None
    labels = module_labels(modules)
    shown = [labels[module] for module in modules]
    known = [share for row in shares for share in row if share is not None]
    end = most_of(quantile(known, STRONG)) or 1.0
    steps = [[step_of(share, end) for share in row] for row in shares]
    return Section(
        "corrections",
        "Corrections",
        [
            "What coefficients alone cannot reach, a correction adds: a matrix beside the merged "
            "weight. The picture shows its size in percent of the weight's own (Frobenius norms): "
            "where it is large, the models disagree most about what the module should do.",
        ],
        [
            Picture(
                name="corrections-map",
                label="Size of the correction, relative to the weight",
                svg=heatmap(steps, grid.layers, "Size of the correction by module and layer"),
                table=Table(
                    "Size of the correction, in percent of the weight",
                    ["layer", *modules],
                    [
                        [
                            str(layer),
                            *(percent_of(row[k]) if row[k] is not None else "" for row in shares),
                        ]
                        for k, layer in enumerate(grid.layers)
                    ],
                ),
                mode="cells",
                gutter=gutter(shown, gutter_width(shown)),
                beside=gutter_width(shown),
                legend=[
                    ("cell z", "0"),
                    (f"cell p{STEPS}", f"{percent_of(end)} or more"),
                ],
                widest=WIDEST * len(grid.layers),
            )
        ],
    )
