"""The memory of a linear's fit on the device that fits, in bytes, as functions of plain sizes.

Each function stands for one operation of this package and must change with it. The moments of
models that are measured apart, in metrics of their own, may be on the host (`on_host`).
"""

from collections.abc import Sequence

from mergekit_dam.fitting.moments import kept_bytes
from mergekit_dam.fitting.sizes import DOUBLE, FLOAT, LinearSize


def gathering_bytes(sizes: Sequence[LinearSize], *, on_host: bool) -> int:
    """Bytes on the device of the moments of linears that see one input, while they are summed.

    Args:
        on_host: the moments of models that are measured apart are on the host once they are summed.
    """
    first = sizes[0]
    product = FLOAT * max(size.weight for size in sizes)  # of a chunk, before it is added
    if first.metric is not None and on_host:
        return product + apart_bytes(sizes) // first.models
    if first.metric is not None or first.models == 1:
        return product + moments_bytes(sizes, on_host=False)
    # The moments of one model, beside the sum over the models before it.
    own = first.columns**2 + sum(size.weight for size in sizes)
    return product + moments_bytes(sizes, on_host=False) + first.dtype.itemsize * own


def apart_bytes(sizes: Sequence[LinearSize]) -> int:
    """Bytes of the moments of linears that see one input, of all models that are measured apart."""
    first = sizes[0]
    if first.metric is None:
        return 0
    return kept_bytes(first.columns, [size.out for size in sizes], first.models, first.dtype)


def moments_bytes(sizes: Sequence[LinearSize], *, on_host: bool) -> int:
    """Bytes on the device of the moments of linears that see one input, when all are summed."""
    first = sizes[0]
    gram, cross = first.columns**2, sum(size.weight for size in sizes)
    if first.metric is not None:
        return 0 if on_host else apart_bytes(sizes)
    # Each linear has its own copy of what is summed over models, as it weighs them in its own way.
    return first.dtype.itemsize * (len(sizes) * gram + cross)


def solution_bytes(size: LinearSize, *, on_host: bool) -> int:
    """Bytes on the device that solving for one weight takes beside its moments there."""
    unknowns, columns, number = size.unknowns, size.columns, size.dtype.itemsize
    # Directions, one residual per term, and a product on its way: the average has gone by then.
    terms = 1 if size.correction != "none" else size.terms
    work = number * size.weight * (unknowns + terms + 2)
    if not size.factorised:
        blocks = 3 * DOUBLE * columns * unknowns**2 if size.by_column else 0
        work += number * size.weight + blocks
        if size.metric is None:
            return work
        gram, cross = number * columns**2, number * size.weight
        if size.correction == "none":
            return work + (terms * gram if on_host else 0)
        # All models' sums in one, from each model's; then the Gram matrix alone.
        return max((1 + on_host) * (gram + cross), gram + work)
    # The factor takes the place of the matrix, which is fp32, as are copies of what it is made of.
    copies = 0 if number == FLOAT else FLOAT * (unknowns * size.weight + columns**2)
    return work + copies + FLOAT * ((unknowns * columns) ** 2 + columns**2)


def factor_bytes(size: LinearSize) -> int:
    """Bytes of the factor of a Gram matrix that a correction is found by."""
    return _solved_in(size) * size.columns**2


def _solved_in(size: LinearSize) -> int:
    """Bytes of a number of a correction's solution: in metrics it is fp32."""
    return FLOAT if size.metric is not None else size.dtype.itemsize


def correction_bytes(size: LinearSize, *, on_host: bool, two: bool) -> int:
    """Bytes on the device that a linear's correction takes beside its moments there.

    Args:
        two: the best minimiser is kept while another is tried.
    """
    if size.correction == "none":
        return 0
    gram, cross = factor_bytes(size), _solved_in(size) * size.weight
    converted = size.dtype.itemsize != _solved_in(size)
    copies = size.terms * (gram + cross) if converted else 0
    merged = 3 * FLOAT * size.weight
    # The residual of all terms together, a whitened minimiser, and that as a matrix.
    vectors = (3 + two) * cross
    tried = (1 + two) * gram + vectors + merged
    if size.metric is None:
        return tried
    # The sums of all models in one, which give the residual, and then the factor.
    apart = int(on_host)
    pooling = (1 + apart) * (gram + cross) + cross
    if size.correction == "full":  # refined with the residuals of all terms, and vectors
        grams = gram + copies + apart * size.terms * gram
        return max(pooling, grams + (size.terms + 8) * cross + merged)
    factors = (1 + apart) * gram + (2 + apart) * cross
    return max(pooling, factors, tried) + copies
