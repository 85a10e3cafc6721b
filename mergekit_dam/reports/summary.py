"""What a merge has gained, in a few numbers: the first thing that a reader wants to know."""

from dataclasses import dataclass

from mergekit_dam.reports.depth import coefficient_map, grid_of, leaders, mean_by_layer
from mergekit_dam.reports.schema import DROPPED, DamReport, Tensor


@dataclass(frozen=True)
class Domain:
    """How far a model's distribution is from the merged one on its own held-out text.

    Attributes:
        model: Name of the model.
        before, after: KL in nats per token of the start (the average) and of the result; None
            where it was not finite.
        tokens: Held-out tokens that judged it; None in reports that do not say so.
    """

    model: str
    before: float | None
    after: float | None
    tokens: int | None

    @property
    def left(self) -> float | None:
        """The fraction of the start's KL that is left."""
        return self.after / self.before if self.before and self.after is not None else None


@dataclass(frozen=True)
class Summary:
    """The summary of a merge.

    Attributes:
        domains: A model with text each; empty if the whole model was not judged.
        mean: The mean over the domains, by the models' loss weights; None without domains.
        leaders: Model -> layers in which its mean coefficient is the largest.
        layers: Number of layers.
        tensors, learned: Number of tensors, and of those whose coefficients were learned.
        kept: Why tensors keep the average -> how many.
        experts: Why experts keep the average, in tensors that were fitted -> how many.
        corrected, uncorrected: Tensors with a correction, and those whose correction was dropped.
    """

    domains: tuple[Domain, ...]
    mean: Domain | None
    leaders: dict[str, tuple[int, ...]]
    layers: int
    tensors: int
    learned: int
    kept: dict[str, int]
    experts: dict[str, int]
    corrected: int
    uncorrected: int


def summary_of(report: DamReport) -> Summary:
    """Summarise a report."""
    grid = grid_of(report)
    maps = coefficient_map(report, grid)
    means = {source: mean_by_layer(rows) for source, rows in maps.items()}
    kept: dict[str, int] = {}
    experts: dict[str, int] = {}
    for tensor in report.tensors:
        if not tensor.learned:
            reason = reason_of(tensor.outcome)
            kept[reason] = kept.get(reason, 0) + 1
        for outcome, own in tensor.experts.items() if tensor.learned else ():
            experts[reason_of(outcome)] = experts.get(reason_of(outcome), 0) + len(own)
    domains, mean = _domains(report)
    return Summary(
        domains=domains,
        mean=mean,
        leaders=leaders(report, means, grid.layers),
        layers=len(grid.layers),
        tensors=len(report.tensors),
        learned=sum(tensor.learned for tensor in report.tensors),
        kept=kept,
        experts=experts,
        corrected=sum(_is_corrected(tensor) for tensor in report.tensors),
        uncorrected=sum(
            tensor.correction is not None and not _is_corrected(tensor) for tensor in report.tensors
        ),
    )


def _is_corrected(tensor: Tensor) -> bool:
    own = tensor.correction
    return own is not None and (own.held_out is not None or own.norm is not None)


def _domains(report: DamReport) -> tuple[tuple[Domain, ...], Domain | None]:
    start, result = report.start, report.result
    if start is None or result is None:
        return (), None
    judged = list(report.calibration)[: len(start.held_out_kl)]
    tokens = report.held_out_tokens
    domains = tuple(
        Domain(model, before, after, tokens.get(model))
        for model, before, after in zip(judged, start.held_out_kl, result.held_out_kl, strict=False)
    )
    known = [own.tokens for own in domains if own.tokens is not None]
    whole = sum(known) if known else None
    return domains, Domain("all", start.mean_held_out_kl, result.mean_held_out_kl, whole)


def reason_of(outcome: str) -> str:
    """Why a tensor keeps the average, in plain words."""
    if outcome == DROPPED:
        return "what was learned was no better on held-out text"
    if outcome.startswith("tied to"):
        return "shares the coefficients of another tensor"
    plain = {
        "identical in all models": "all models have the same weights there",
        "copied: of one model alone": "one model alone is merged there",
        "averaged, as configured": "the configuration says so",
        "replayed": "coefficients were replayed from a file",
        "start kept": "no trial was better than the start",
    }
    return plain.get(outcome, outcome.removeprefix("averaged: ").removeprefix("start kept: "))
