"""Merges of tensors in memory with known coefficients: no model, no text, no fit.

This is the method `dam` in `mergekit.merge_methods.merge_tensors` and `merge_state_dicts`, and in
`mergekit-pytorch` for raw files.

    merge_state_dicts({"a": a, "b": b}, "dam", parameters={"coefficients": "./out"})
    merge_tensors([a, b], "dam", parameters={"coefficients": torch.tensor([[0.3], [0.7]])})
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from mergekit_dam.coefficients.correction import Correction, Corrections
from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.merge import column_counts, column_problem, merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.rows import Identity, match_rows
from mergekit_dam.coefficients.shapes import correction_problem
from mergekit_dam.errors import DamError, listed

KnownCoefficients = str | CoefficientFile | Mapping[str, Tensor] | Tensor
"""A path, a loaded file, coefficients by tensor name, or the coefficients of one tensor."""


def merge_given(
    tensors: Sequence[Tensor],
    given: KnownCoefficients,
    *,
    ids: Sequence[Hashable],
    name: str | None,
) -> Tensor:
    """Merge one tensor of every source.

    Args:
        tensors: One tensor per source, all of one shape and dtype.
        given: Coefficients `[sources, n]`. n is 1 or the tensors' size along the last dimension
            (or along the one that a file names); for experts, see `merge_weights`.
        ids: Ids of the sources: their names in a file, or plain numbers without a meaning.
        name: Name of the tensor, by which its coefficients are found.

    Returns:
        A tensor of the sources' shape and dtype.

    Raises:
        DamError: If there are no coefficients for this tensor, or they do not fit it.
    """
    coefficients, axis, order = _found(given, ids, name)
    tensors = [tensors[index] for index in order or range(len(tensors))]
    if coefficients.ndim != 2 or coefficients.shape[0] != len(tensors):
        count = len(tensors)
        allowed = (f"[{count}, {n}]" for n in column_counts(tensors[0].shape, axis))
        raise DamError(
            f"{name}: required coefficients of shape {' or '.join(allowed)}, a row for each of the "
            f"tensors, got {list(coefficients.shape)}"
        )
    problem = column_problem(coefficients.shape[1], tensors[0].shape, axis)
    if problem:
        raise DamError(f"{name}: {problem}")
    if not coefficients.isfinite().all():
        raise DamError(f"{name}: required finite coefficients, got NaN or infinity")
    correction = _correction(given, name)
    if correction is not None:
        shapes = {key: tensor.shape for key, tensor in correction.tensors.items()}
        problem = correction_problem(shapes, tensors[0].shape, axis)
        if problem:
            raise DamError(f"{name}: {problem}")
    merged = merge_weights(tensors, coefficients.float(), axis=axis, correction=correction)
    return _finite(merged.to(tensors[0].dtype), name)


def merge_average(
    tensors: Sequence[Tensor], weights: Sequence[float], *, base: int | None
) -> Tensor:
    """The weighted average that a fit starts from, without the base.

    Args:
        tensors: One tensor per source.
        weights: Relative weight of each source.
        base: Index of the base among the sources, or None.

    Raises:
        DamError: If no source has a weight above 0.
    """
    merged = [w for index, w in enumerate(weights) if index != base]
    if not sum(merged):
        raise DamError("every tensor has `weight: 0`; an average needs at least one other weight")
    form = Parametrisation.create(weights, base=base, include_base=False, sum_to_one=True)
    return _finite(merge_weights(tensors, form.starting_coefficients()).to(tensors[0].dtype), None)


def _finite(merged: Tensor, name: str | None) -> Tensor:
    """A merged tensor, if it is finite."""
    if merged.is_floating_point() and not merged.isfinite().all():
        raise DamError(
            f"{'' if name is None else f'{name}: '}the merged tensor is not finite; required "
            f"tensors without NaN and infinity, and a dtype wide enough for their sum"
        )
    return merged


def _found(
    given: KnownCoefficients, ids: Sequence[Hashable], name: str | None
) -> tuple[Tensor, int, Sequence[int] | None]:
    """One tensor's coefficients, their dimension, and the sources' indices in row order."""
    known = resolved(given)
    if isinstance(known, Tensor):
        return known, -1, None
    by_name = known.coefficients if isinstance(known, CoefficientFile) else known
    if name is None or name not in by_name:
        raise DamError(
            f"required coefficients for the tensor {name!r}, got those of {len(by_name)} others "
            f"({', '.join(list(by_name)[:3])}); tensors are known by their names in the state dict"
        )
    if not isinstance(known, CoefficientFile):
        return by_name[name], -1, None
    rows = _rows(known.sources, tuple(ids))
    # Sums in another order are rounded differently; the file's order gives the bytes of its merge.
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return by_name[name], known.metadata.get("axes", {}).get(name, -1), order


def _correction(given: KnownCoefficients, name: str | None) -> Correction | None:
    """The correction that a file has for a tensor, if it has one."""
    known = resolved(given)
    if name is None or not isinstance(known, CoefficientFile) or known.corrections is None:
        return None
    return Corrections.of_file(known.corrections).get(name)


def resolved(given: KnownCoefficients) -> CoefficientFile | Mapping[str, Tensor] | Tensor:
    """The given coefficients, read from their file if a path is given.

    Raises:
        ConfigError: If there is no such file, or this package did not write it.
    """
    if not isinstance(given, str):
        return given
    path = Path(given)
    return _load(given, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=2)
def _load(path: str, _: int) -> CoefficientFile:
    """Read a file once for all tensors; a file with a new modification time is read again."""
    return CoefficientFile.load(path)


@lru_cache(maxsize=2)
def _rows(sources: tuple[str, ...], ids: tuple[Hashable, ...]) -> tuple[int, ...]:
    """The row of each source; cached, so that a warning about other names appears once.

    Sources of which a file knows none go by their order.

    Raises:
        DamError: The file knows some of the names, and not others.
    """
    if ids == tuple(range(len(sources))):
        return tuple(range(len(sources)))
    file = CoefficientFile({}, sources, {})
    models = [Identity(str(own)) for own in ids]
    if len(models) == len(sources):
        known = match_rows(file.identities, models).named
        if 0 < known < len(models):
            raise DamError(
                f"coefficients: required the sources {listed(sources, 5)}, got "
                f"{listed(ids, 5)}, of which {len(models) - known} are unknown; name them as the "
                f"file does, or pass a list in the order of the file"
            )
    return tuple(file.rows_of(models, changed="allow"))
