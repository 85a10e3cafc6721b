"""Coefficients of an earlier merge, for the models and tensors of this one."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

from mergekit.common import ModelReference

from mergekit_dam.coefficients.correction import Corrections
from mergekit_dam.coefficients.file import Changed, CoefficientFile
from mergekit_dam.coefficients.merge import column_problem
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.shapes import correction_problem, stored_shapes
from mergekit_dam.coefficients.tensors import TensorReport, TensorSpec
from mergekit_dam.errors import ConfigError, listed
from mergekit_dam.host.identities import identities, named_only
from mergekit_dam.host.merge import Tensors
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.streams import distributed


def identified(prepared: Prepared, models: Sequence[ModelReference]) -> Prepared:
    """The same with what tells the models from others, where coefficients are given.

    Args:
        prepared: the checked configuration.
        models: the models, whose files are on this machine.
    """
    if prepared.replay is None and prepared.start is None:
        return prepared
    known = distributed.from_first(lambda: identities(models, prepared.names))
    return replace(prepared, identities=known)


def in_rows(prepared: Prepared, order: Sequence[ModelReference]) -> tuple[ModelReference, ...]:
    """The models of a replay in the order of the rows that they take from its file.

    Sums in another order would be rounded differently.

    Raises:
        ConfigError: the models are not those of the file, and `changed_models` does not allow it.
    """
    assert prepared.replay is not None
    rows = _rows(prepared, prepared.replay, order, prepared.run.changed_models)
    return tuple(model for _, model in sorted(zip(rows, order, strict=True), key=itemgetter(0)))


def start_record(
    prepared: Prepared,
    saved: CoefficientFile,
    tensors: Tensors,
) -> MergeRecord:
    """The saved coefficients that a search starts from; models may have been trained since.

    Raises:
        ConfigError: as `saved_record` does.
    """
    rows = _rows(prepared, saved, tensors.order, "allow")
    return saved_record(saved, tensors.specs, rows, tensors.shapes)


def _rows(
    prepared: Prepared, saved: CoefficientFile, order: Sequence[ModelReference], changed: Changed
) -> list[int]:
    """The row of every model; by names alone where no files are known, as in an estimate."""
    known = prepared.identities
    own = [known.get(model) or named_only(model, prepared.names) for model in order]
    return saved.rows_of(own, changed=changed if known else "allow")


def saved_record(
    saved: CoefficientFile,
    specs: Sequence[TensorSpec],
    rows: Sequence[int],
    shapes: Mapping[str, tuple[int, ...]],
) -> MergeRecord:
    """The saved coefficients of every planned tensor, rows in the order of the sources.

    Args:
        saved: the file of coefficients.
        specs: the planned tensors.
        rows: the row of each source.
        shapes: shapes of the tensors, where headers give them.

    Raises:
        ConfigError: the file belongs to other models or layers.
    """
    axes = saved.metadata.get("axes", {})
    names = [spec.name for spec in specs]
    problems = [
        *(f"none for {name}" for name in names if name not in saved.coefficients),
        *(f"some for {name}, which is not merged" for name in saved.coefficients.keys() - names),
    ]
    for name in saved.coefficients.keys() & shapes.keys():
        columns, shape = saved.coefficients[name].shape[1], shapes[name]
        if column_problem(columns, shape, axes.get(name, -1)):
            problems.append(f"{columns} per source for {name}, of shape {list(shape)}")
    problems += _correction_problems(saved, names, shapes)
    if problems:
        raise ConfigError(
            f"{saved.parameter}: the file has {listed(sorted(problems))}; "
            f"it belongs to another model or "
            f"another choice of layers"
        )
    return MergeRecord(
        coefficients={name: saved.coefficients[name][list(rows)] for name in names},
        axes={name: axes[name] for name in names if axes.get(name, -1) != -1},
        reports={name: TensorReport(name, "replay", "replayed") for name in names},
        corrections=None if saved.corrections is None else Corrections.of_file(saved.corrections),
    )


def _correction_problems(
    saved: CoefficientFile, names: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """What is wrong with the corrections that belong to a file, by their headers."""
    stored = {} if saved.corrections is None else stored_shapes(saved.corrections)
    axes = saved.metadata.get("axes", {})
    for name, own in stored.items():
        if name not in names:
            yield f"a correction for {name}, which is not merged"
        elif name in shapes:
            problem = correction_problem(own, shapes[name], axes.get(name, -1))
            if problem is not None:
                yield f"a wrong correction for {name}: {problem}"
