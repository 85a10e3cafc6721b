"""The numbers behind the pictures, as plain values for other programs."""

import dataclasses
from typing import Any

from mergekit_dam.reports.depth import (
    coefficient_map,
    corrected_modules,
    correction_map,
    grid_of,
    losses_by_layer,
    mean_by_layer,
)
from mergekit_dam.reports.schema import DamReport
from mergekit_dam.reports.summary import summary_of


def numbers_of(report: DamReport) -> dict[str, Any]:
    """Summary, means by layer, corrections, losses and trials; models by their whole names."""
    grid = grid_of(report)
    maps = coefficient_map(report, grid)
    return {
        "summary": dataclasses.asdict(summary_of(report)),
        "layers": list(grid.layers),
        "modules": list(grid.modules),
        "mean_coefficients": {source: list(mean_by_layer(rows)) for source, rows in maps.items()},
        "coefficients": {
            source: [[None if cell is None else cell.spread.mean for cell in row] for row in rows]
            for source, rows in maps.items()
        },
        "corrections": dict(zip(corrected_modules(grid), correction_map(grid), strict=True)),
        "losses": [dataclasses.asdict(own) for own in losses_by_layer(grid)],
        "trials": [trial.model_dump() for trial in report.search],
    }
