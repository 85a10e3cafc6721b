"""The first section: what the merge has gained, in ten seconds."""

from collections.abc import Mapping, Sequence

from mergekit_dam.reports.content import Picture, Section, Table
from mergekit_dam.reports.depth import grid_of, losses_by_layer
from mergekit_dam.reports.names import ranges
from mergekit_dam.reports.pictures.bars import Row, pairs
from mergekit_dam.reports.pictures.svg import series
from mergekit_dam.reports.schema import DamReport
from mergekit_dam.reports.summary import Domain, Summary
from mergekit_dam.reports.words import number, percent_of, plural

FEW = 2048
"""Held-out tokens of a model below which a verdict is called rough."""

LONGEST = 30
"""Characters of a list of layers, beyond which it is left to the pictures."""

UNIT = "nats per token"


def gains(report: DamReport, summary: Summary) -> Section:
    """What was gained, who leads where, what keeps the average, and how sure that is."""
    names = report.names
    said = [
        headline(report, summary),
        *_leading(summary, names),
        *_kept(summary),
        *sureness(summary),
        *report.left_out,
    ]
    return Section("summary", "In short", said, [_picture(summary, report)] if summary.mean else [])


def headline(report: DamReport, summary: Summary) -> str:
    """The gain in one sentence."""
    mean = summary.mean
    if report.copied:
        return "Every tensor is a copy of one model's, so there was nothing to learn."
    if report.replayed:
        return "Coefficients were replayed from the file of an earlier merge; nothing was fitted."
    if mean is None:
        losses = losses_by_layer(grid_of(report))
        told = "The merged model was fitted layer by layer, and was not judged as a whole"
        if not losses:
            return f"{told}."
        before, after = (
            sum(own) for own in zip(*((x.before, x.after) for x in losses), strict=True)
        )
        return f"{told}. On held-out text, its layers' errors are {_change(before, after)}."
    begun = start_of(report)
    if mean.left is None or mean.after is None:
        return f"How near the merged model came, compared with {begun}, is not known."
    if mean.left == 1:
        return f"Nothing that was tried came nearer to the models than {begun}: that is the result."
    return (
        f"The merged model is {percent_of(1 - mean.left)} nearer to its models than {begun}: on "
        f"held-out text, the KL from their predictions fell from {number(mean.before)} to "
        f"{number(mean.after)} {UNIT}."
    )


def start_of(report: DamReport) -> str:
    """What the merge is compared with."""
    start = report.parameters.get("start", "average")
    known = {"average": "their plain average", "random": "the random start"}
    return known.get(str(start), "the earlier merge that it started from")


def _change(before: float, after: float) -> str:
    if not before or after == before:
        return "those of the average"
    less = "smaller" if after < before else "larger"
    return f"{percent_of(abs(1 - after / before))} {less} than those of the average"


def _leading(summary: Summary, names: Mapping[str, str]) -> list[str]:
    """Which model has the largest coefficients where."""
    if not summary.leaders:
        return []
    order = sorted(summary.leaders.items(), key=lambda own: -len(own[1]))
    if len(order) == 1:
        return [f"{names[order[0][0]]} has the largest coefficients in every layer."]
    told = "; ".join(f"{names[model]} in {_layers(layers)}" for model, layers in order)
    return [f"Largest coefficients: {told}."]


def _layers(layers: Sequence[int]) -> str:
    """How many layers, and which, where that is quickly said."""
    which = ranges(layers)
    return plural(len(layers), "layer") + (f" ({which})" if len(which) <= LONGEST else "")


def _kept(summary: Summary) -> list[str]:
    """What keeps the average, and why."""
    if not summary.learned:
        return []
    told = f"{summary.learned:,} of {plural(summary.tensors, 'tensor')} were learned."
    if summary.kept:
        told += f" The others keep the average ({_counted(summary.kept)})."
    if summary.experts:
        experts = _counted(summary.experts)
        told += f" So do some experts in tensors that were learned ({experts})."
    if summary.uncorrected:
        told += (
            f" {plural(summary.uncorrected, 'correction')} of "
            f"{summary.corrected + summary.uncorrected:,} did no good on held-out text and "
            f"{'was' if summary.uncorrected == 1 else 'were'} dropped."
        )
    return [told]


def _counted(reasons: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,}: {why}" for why, count in reasons.items())


def sureness(summary: Summary) -> list[str]:
    """How much text the verdict rests on."""
    tokens = [own.tokens for own in summary.domains if own.tokens is not None]
    if not tokens:
        return []
    if not min(tokens):
        return [
            "No text was held out (`holdout: 0`): the merge was judged on the text it was fitted "
            "to, which flatters it."
        ]
    low, high = min(tokens), max(tokens)
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    told = f"This rests on {each} held-out tokens per model, which took no part in the fit."
    if low < FEW:
        told += (
            " That is little: take differences of a few percent for noise, and raise `samples` or "
            "`holdout` for a firmer verdict."
        )
    return [told]


def _picture(summary: Summary, report: DamReport) -> Picture:
    names = report.names
    order = {source: series(k) for k, source in enumerate(report.sources)}
    assert summary.mean is not None
    every = [(names[own.model], order[own.model], own) for own in summary.domains]
    if len(every) > 1:
        every.append(("all, by weight", "all", summary.mean))
    rows = [Row(name, _said(own), (own.before, own.after), color) for name, color, own in every]
    return Picture(
        name="gain",
        label=f"KL from each model on its own held-out text, in {UNIT}",
        svg=pairs(rows, "Distance of the merged model from each of its models, before and after"),
        table=domain_table(summary, names),
        mode="rows",
        legend=[("ring", "before: " + start_of(report)), ("dot", "after: this merge")],
    )


def _said(own: Domain) -> str:
    change = "" if own.left is None else f"  ({percent_of(own.left - 1)})"
    return f"{number(own.before)} → {number(own.after)}{change}"


def domain_table(summary: Summary, names: Mapping[str, str]) -> Table:
    """The held-out losses of every model."""
    every = [(names[own.model], own) for own in summary.domains]
    if summary.mean is not None and len(every) > 1:
        every.append(("all, by weight", summary.mean))
    return Table(
        f"KL from each model on held-out text, in {UNIT}; 0 is the model itself",
        ["model", "average", "this merge", "change", "held-out tokens"],
        [
            [
                name,
                number(own.before, 4),
                number(own.after, 4),
                "" if own.left is None else percent_of(own.left - 1),
                "" if own.tokens is None else f"{own.tokens:,}",
            ]
            for name, own in every
        ],
    )
