"""Numbers by layer and module: coefficients, corrections and losses."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mergekit_dam.reports.names import place_of
from mergekit_dam.reports.schema import DamReport, Spread, Tensor


@dataclass(frozen=True)
class Grid:
    """The tensors of the merged decoder by module and layer.

    Attributes:
        layers: Numbers of the layers, ascending.
        modules: Modules in the order in which data passes them.
        cells: (module, layer) -> its tensors; several if experts have tensors of their own.
        outside: Tensors of no layer: embeddings, the last norm, the head.
        elsewhere: Tensors of other stacks, such as a vision tower; they are averaged.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    cells: Mapping[tuple[str, int], tuple[Tensor, ...]]
    outside: tuple[Tensor, ...]
    elsewhere: tuple[Tensor, ...]

    def of_layer(self, layer: int) -> list[Tensor]:
        """All tensors of a layer."""
        return [t for module in self.modules for t in self.cells.get((module, layer), ())]


def grid_of(report: DamReport) -> Grid:
    """Sort the tensors of a report; the stack with the most learned tensors is the decoder."""
    placed = [(tensor, place_of(tensor.name)) for tensor in report.tensors]
    votes: Counter[str] = Counter()
    for tensor, place in placed:
        if place is not None:
            votes[place.stack] += 1000 if tensor.learned else 1
    stack = votes.most_common(1)[0][0] if votes else ""
    cells: dict[tuple[str, int], list[Tensor]] = {}
    outside, elsewhere = [], []
    for tensor, place in placed:
        if place is None:
            outside.append(tensor)
        elif place.stack == stack:
            cells.setdefault((place.module, place.layer), []).append(tensor)
        else:
            elsewhere.append(tensor)
    return Grid(
        tuple(sorted({layer for _, layer in cells})),
        tuple(dict.fromkeys(module for module, _ in cells)),
        {key: tuple(tensors) for key, tensors in cells.items()},
        tuple(outside),
        tuple(elsewhere),
    )


@dataclass(frozen=True)
class Cell:
    """One source's coefficients in a module of a layer.

    Attributes:
        spread: Coefficients over the columns; of several experts, over all of them.
        kept: Why it keeps the average; empty if its coefficients were learned.
    """

    spread: Spread
    kept: str = ""


Rows = tuple[tuple[Cell | None, ...], ...]
"""Modules, and in each the layers."""


def coefficient_map(report: DamReport, grid: Grid) -> dict[str, Rows]:
    """Source -> its coefficients by module and layer; None where a layer lacks the module."""
    return {
        source: tuple(
            tuple(_cell(grid.cells.get((module, layer), ()), source) for layer in grid.layers)
            for module in grid.modules
        )
        for source in report.sources
    }


def _cell(tensors: Sequence[Tensor], source: str) -> Cell | None:
    spreads = [t.coefficients[source] for t in tensors if source in t.coefficients]
    if not spreads:
        return None
    learned = any(tensor.learned or tensor.outcome == "replayed" for tensor in tensors)
    return Cell(_joined(spreads), "" if learned else tensors[0].outcome)


def _joined(spreads: Sequence[Spread]) -> Spread:
    """The spread over equally many columns of several tensors."""
    mean = fmean(spread.mean for spread in spreads)
    stds = [spread.std for spread in spreads if spread.std is not None]
    std = None
    if len(stds) == len(spreads):
        pairs = zip(spreads, stds, strict=True)
        std = fmean(own**2 + (spread.mean - mean) ** 2 for spread, own in pairs) ** 0.5
    return Spread(
        mean=mean, min=min(s.min for s in spreads), max=max(s.max for s in spreads), std=std
    )


def mean_by_layer(coefficients: Rows) -> tuple[float | None, ...]:
    """Mean of one source's learned coefficients over the modules of each layer."""
    return tuple(
        _mean(cell.spread.mean for cell in column if cell is not None and not cell.kept)
        for column in zip(*coefficients, strict=True)
    )


def leaders(
    report: DamReport, means: Mapping[str, Sequence[float | None]], layers: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Model -> the layers in which its mean coefficient is the largest of all models.

    A base takes the remainder, so it leads nowhere, unless it has text and is merged like a model.
    """
    models = [source for source in report.sources if not report.is_remainder(source)]
    if report.base_model is None and report.calibration:
        models = [source for source in models if source in report.calibration] or models
    found: dict[str, list[int]] = {model: [] for model in models}
    for position, layer in enumerate(layers):
        own = {m: v for m in models if (v := means[m][position]) is not None}
        if len(own) > 1:
            found[max(own, key=own.__getitem__)].append(layer)
    return {model: tuple(led) for model, led in found.items() if led}


def correction_map(grid: Grid) -> tuple[tuple[float | None, ...], ...]:
    """Size of the correction as a fraction of the weight, by module with any and by layer."""
    return tuple(
        tuple(_share(grid.cells.get((module, layer), ())) for layer in grid.layers)
        for module in corrected_modules(grid)
    )


def corrected_modules(grid: Grid) -> tuple[str, ...]:
    """Modules of which a correction's size is known in some layer."""
    known = {m for (m, _), tensors in grid.cells.items() if _share(tensors) is not None}
    return tuple(module for module in grid.modules if module in known)


def _share(tensors: Iterable[Tensor]) -> float | None:
    return _mean(t.correction.share for t in tensors if t.correction is not None)


@dataclass(frozen=True)
class LayerLoss:
    """Mean loss of a layer's fitted tensors, as fractions of the energy of the models' outputs.

    Attributes:
        before, after: On held-out text: of the average, and of what the layer fit kept.
        fit_before, fit_after: The same on the text of the fit, if it is known of all of them.
        tensors: Number of tensors.
    """

    layer: int
    before: float
    after: float
    fit_before: float | None
    fit_after: float | None
    tensors: int


def losses_by_layer(grid: Grid) -> list[LayerLoss]:
    """The layers of which losses are known."""
    found = []
    for layer in grid.layers:
        known = [t for t in grid.of_layer(layer) if t.held_out_before is not None]
        both = [t for t in known if t.loss_start is not None and t.loss_fitted is not None]
        before, after = (
            _mean(t.held_out_before for t in known),
            _mean(t.held_out_after for t in known),
        )
        if before is not None and after is not None:
            if len(both) < len(known):
                both = []
            fits = _mean(t.loss_start for t in both), _mean(_fit_after(t) for t in both)
            found.append(LayerLoss(layer, before, after, *fits, len(known)))
    return found


def _fit_after(tensor: Tensor) -> float | None:
    """Loss of the kept coefficients on the text of the fit."""
    before, after = tensor.held_out_start, tensor.held_out_fitted
    kept = before is None or (after is not None and after < before)
    return tensor.loss_fitted if kept else tensor.loss_start


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def quantile(values: Iterable[float], fraction: float) -> float:
    """The value below which a fraction of the values lie; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else 0.0
