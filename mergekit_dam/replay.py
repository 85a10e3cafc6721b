"""Coefficients of an earlier merge, for the models and tensors of this one."""

from collections.abc import Mapping, Sequence

from mergekit.common import ModelReference

from mergekit_dam.coefficients import CoefficientFile, column_counts
from mergekit_dam.errors import ConfigError
from mergekit_dam.fitting.tensors import TensorReport
from mergekit_dam.stage import Record, TensorPlan


def saved_record(
    saved: CoefficientFile,
    plans: Sequence[TensorPlan],
    order: Sequence[ModelReference],
    shapes: Mapping[str, tuple[int, ...]],
) -> Record:
    """The saved coefficients of every planned tensor, rows in the order of the sources.

    Args:
        shapes: of the tensors, where headers tell them.

    Raises:
        ConfigError: the file belongs to other models or layers.
    """
    rows = saved.rows_of([str(model) for model in order])
    axes = saved.metadata.get("axes", {})
    names = [plan.name for plan in plans]
    problems = [
        *(f"none for {name}" for name in names if name not in saved.coefficients),
        *(f"some for {name}, which is not merged" for name in saved.coefficients.keys() - names),
    ]
    for name in saved.coefficients.keys() & shapes.keys():
        columns, shape = saved.coefficients[name].shape[1], shapes[name]
        if columns not in column_counts(shape, axes.get(name, -1)):
            problems.append(f"{columns} a model for {name}, of shape {list(shape)}")
    if problems:
        raise ConfigError(
            [
                f"{saved.parameter}: the file has {', '.join(sorted(problems)[:3])}"
                f"{' and so on' if len(problems) > 3 else ''}; it belongs to another model or "
                f"another choice of layers"
            ]
        )
    return Record(
        coefficients={name: saved.coefficients[name][rows] for name in names},
        axes={name: axes[name] for name in names if axes.get(name, -1) != -1},
        reports={name: TensorReport(name, "replay", "replayed") for name in names},
    )
