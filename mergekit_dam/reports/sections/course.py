"""Sections about the course of the merge: trials, time and memory."""

from mergekit_dam.reports.content import Picture, Section, Table
from mergekit_dam.reports.pictures.bars import Row, bars
from mergekit_dam.reports.schema import DamReport, Trial
from mergekit_dam.reports.words import number, size
from mergekit_dam.tables import duration


def trials(report: DamReport) -> Section | None:
    """What the search has tried."""
    if not report.search:
        return None
    names = report.names
    judged = [names[model] for model in report.calibration][: len(report.search[0].held_out_kl)]
    rows = [
        Row(
            name_of(trial),
            f"{number(trial.mean_held_out_kl)}, {'kept' if trial.kept else 'dropped'}",
            (trial.mean_held_out_kl,),
            "kept" if trial.kept else "dropped",
        )
        for trial in report.search
    ]
    return Section(
        "trials",
        "Trials",
        [
            "What was tried, one after the other, and how far the whole model then was from its "
            "models on held-out text (mean KL, in nats per token). A trial that brings it no "
            "nearer is dropped; the last one that was kept is the result.",
        ],
        [
            Picture(
                name="trials-bars",
                label="Mean KL on held-out text after each trial",
                svg=bars(rows, "Mean KL on held-out text after each trial"),
                table=Table(
                    "Trials: KL on held-out text, in nats per token",
                    ["trial", "mean", *judged, "outcome", "time", "remarks"],
                    [
                        [
                            name_of(trial),
                            number(trial.mean_held_out_kl, 4),
                            *(number(value, 4) for value in trial.held_out_kl),
                            "kept" if trial.kept else "dropped",
                            duration(trial.seconds),
                            _remarks(trial),
                        ]
                        for trial in report.search
                    ],
                ),
                mode="rows",
                legend=[("cell kept", "kept"), ("cell dropped", "dropped")],
            )
        ],
    )


def name_of(trial: Trial) -> str:
    """A trial's name in words."""
    kind, _, rest = trial.name.partition(", ")
    known = {"layer": "layer fit", "logits": "end-to-end fit"}
    return known.get(kind, kind) + (f", {rest}" if rest else "")


def _remarks(trial: Trial) -> str:
    told = [f"{key.replace('_', ' ')} {value:g}" for key, value in trial.details.items()]
    return "; ".join([*told, *([f"ended early by {trial.ended}"] if trial.ended else [])])


def cost(report: DamReport) -> Section | None:
    """Time of each phase, and the peak of the memory."""
    phases = [(name_of(trial), trial.seconds) for trial in report.search]
    stages = list(report.seconds.items())
    if not phases:
        phases = stages
    if not phases:
        return None
    whole = sum(seconds for _, seconds in phases)
    rows = [Row(name, duration(seconds), (seconds,), "s0") for name, seconds in phases]
    said = [f"The fit took {duration(whole)}."]
    if report.peak_memory_bytes:
        peaks = ", ".join(
            f"{size(peak)} on {'the host' if device == 'host' else device}"
            for device, peak in report.peak_memory_bytes.items()
        )
        said.append(f"Memory at its peak: {peaks}, over the whole merge.")
    tables = []
    if report.search and stages:
        every = [[stage, duration(seconds)] for stage, seconds in stages]
        tables = [
            Table("Time of each stage in the layer fit that was kept", ["stage", "time"], every)
        ]
    return Section(
        "cost",
        "Time and memory",
        said,
        [
            Picture(
                name="cost-bars",
                label="Time of each phase",
                svg=bars(rows, "Time of each phase"),
                table=Table(
                    "Time of each phase",
                    ["phase", "time"],
                    [[name, duration(seconds)] for name, seconds in phases],
                ),
                mode="rows",
            )
        ],
        tables,
    )
