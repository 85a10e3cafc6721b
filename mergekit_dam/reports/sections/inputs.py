"""Sections about what went in: text, parameters and versions."""

from collections.abc import Iterator

from mergekit_dam.calibration.source import OPTION
from mergekit_dam.reports.content import Section, Table
from mergekit_dam.reports.schema import DamReport, Text


def text(report: DamReport) -> Section | None:
    """How much text each model was given; never its words."""
    if not report.calibration:
        return None
    names = report.names
    rows = [
        [
            names[model],
            source_of(own),
            f"{own.documents_used:,} of {own.documents_read:,}",
            f"{own.sequences:,} of {own.sequence_length:,} tokens",
            f"{own.tokens_used:,}"
            + ("" if own.tokens_counted is None else f", of which {own.tokens_counted:,} count"),
            f"{report.held_out_tokens[model]:,}" if model in report.held_out_tokens else "",
            "; ".join(own.cut) or "nothing",
        ]
        for model, own in report.calibration.items()
    ]
    warnings = [
        f"{names[model]}: {warning}"
        for model, own in report.calibration.items()
        for warning in own.warnings
    ]
    return Section(
        "text",
        "Text",
        ["The text that each model was fitted and judged on. The report holds none of its words."],
        tables=[
            Table(
                "Calibration text",
                ["model", "source", "documents", "sequences", "tokens", "held out", "cut"],
                rows,
            )
        ],
        notes=warnings,
    )


def source_of(own: Text) -> str:
    """Where text came from: data sets of the Hub, or the names of files."""
    parts = [part for piece in (own.parts or (own,)) for part in _sources(piece)]
    return ", ".join(dict.fromkeys(parts)) + (" (a model wrote it)" if own.synthetic else "")


def _sources(own: Text) -> Iterator[str]:
    if own.dataset is not None:
        yield own.dataset
    else:
        location = OPTION.split(own.source)[0]  # an option may name a file, too
        yield location.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or own.source


def settings(report: DamReport) -> Section:
    """Parameters and versions."""
    tables = []
    if report.parameters:
        every = [[key, str(value)] for key, value in report.parameters.items()]
        tables.append(Table("Parameters of the configuration", ["parameter", "value"], every))
    if report.versions:
        every = [[package, version] for package, version in report.versions.items()]
        tables.append(Table("Versions", ["package", "version"], every))
    return Section(
        "settings",
        "How it was made",
        [
            "`mergekit_config.yml` beside this page is the whole configuration; "
            "`dam_report.json` holds the numbers of every tensor.",
        ],
        tables=tables,
    )
