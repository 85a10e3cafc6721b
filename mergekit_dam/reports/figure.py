"""A figure of the coefficients, as a picture file."""

from pathlib import Path
from typing import Any

from mergekit_dam.errors import DamError
from mergekit_dam.reports.depth import Grid, Rows, coefficient_map, grid_of
from mergekit_dam.reports.names import module_labels
from mergekit_dam.reports.pictures.colours import LIGHT, STEPS, colours
from mergekit_dam.reports.schema import DamReport
from mergekit_dam.reports.sections.maps import label_of, scale_end


def write_figure(report: DamReport, file: Path) -> None:
    """Draw a map of modules by layers for every model, in the format that the name ends with.

    Raises:
        DamError: matplotlib is missing, the merge has no layers, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DamError(
            f"--png: required matplotlib, which cannot be imported ({error}): "
            f"pip install 'mergekit-dam[plot]'"
        ) from error
    grid = grid_of(report)
    if not grid.layers:
        raise DamError(f"{file}: required a merge of layers, got one whose tensors have no numbers")
    maps = coefficient_map(report, grid)
    end = scale_end(report, maps)
    width = 2.2 + max(3.0, 0.11 * len(grid.layers))
    figure = Figure((width, (0.8 + 0.17 * len(grid.modules)) * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    drawn = [
        _map(axis, rows, grid, end, label_of(report, source, report.names))
        for axis, (source, rows) in zip(axes, maps.items(), strict=True)
    ]
    axes[-1].set_xlabel("layer", fontsize=8)
    figure.colorbar(drawn[0], ax=list(axes), label="mean coefficient", shrink=0.6)
    try:
        figure.savefig(file, dpi=160)
    except (OSError, ValueError) as error:
        raise DamError(
            f"{file}: required a file that can be written, with a name that ends in .png, .svg or "
            f".pdf ({error}); name another one"
        ) from error


def _map(axis: Any, rows: Rows, grid: Grid, end: float, title: str) -> Any:
    """Draw one model's map; returns the image, whose colours are those of all maps."""
    labels = module_labels(grid.modules)
    means = [[float("nan") if cell is None else cell.spread.mean for cell in row] for row in rows]
    half = end * (1 + 0.5 / STEPS)  # so that a step is centred on its value, as on the page
    drawn = axis.imshow(means, cmap=_shades(), vmin=-half, vmax=half, aspect="auto")
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_yticks(range(len(rows)), [labels[module] for module in grid.modules], fontsize=7)
    step = max(1, len(grid.layers) // 10)
    axis.set_xticks(range(0, len(grid.layers), step), grid.layers[::step], fontsize=7)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return drawn


def _shades() -> Any:
    """The colours of the page as a colour map; cells without a value stay white."""
    from matplotlib.colors import ListedColormap

    own = colours(LIGHT)
    order = [f"n{k}" for k in range(STEPS, 0, -1)] + ["z"] + [f"p{k}" for k in range(1, STEPS + 1)]
    return ListedColormap([own[step] for step in order]).with_extremes(bad="white")
