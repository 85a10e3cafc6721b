"""The section about the losses of layers."""

from mergekit_dam.reports.content import Picture, Section, Table
from mergekit_dam.reports.depth import Grid, LayerLoss, losses_by_layer
from mergekit_dam.reports.pictures.lines import Line, lines
from mergekit_dam.reports.schema import DamReport
from mergekit_dam.reports.words import percent_of


def losses(report: DamReport, grid: Grid) -> Section | None:
    """Loss of each layer before and after the layer fit, on the text of the fit and on other."""
    known = losses_by_layer(grid)
    if not known:
        return None
    fitted = [own for own in known if own.fit_before is not None]
    drawn = [
        Line("before", [own.before for own in known]),
        Line("after", [own.after for own in known]),
    ]
    legend = [("line before", "averaged"), ("line after", "merged")]
    if fitted:
        drawn += [
            Line("before dashed", [own.fit_before for own in known]),
            Line("after dashed", [own.fit_after for own in known]),
        ]
        legend += [
            ("line before dashed", "averaged, on the text of the fit"),
            ("line after dashed", "merged, on the text of the fit"),
        ]
    return Section(
        "losses",
        "Errors by layer",
        [
            "How far the outputs of a layer's modules are from those of the models, as a part of "
            "their energy: once with the module's weights averaged, once as they were merged, both "
            "behind merged modules. Solid lines are held-out text.",
        ],
        [
            Picture(
                name="loss-lines",
                label="Error by layer, mean over the modules",
                svg=lines(
                    drawn,
                    [own.layer for own in known],
                    "Error by layer, before and after",
                    percent_of,
                ),
                table=_table(known, fitted),
                mode="rows",
                legend=legend,
            )
        ],
        notes=_notes(report, known),
    )


def _table(known: list[LayerLoss], fitted: list[LayerLoss]) -> Table:
    head = ["layer", "averaged", "merged"]
    if fitted:
        head += ["averaged, text of the fit", "merged, text of the fit"]
    return Table(
        "Error by layer, in percent of the energy of the models' outputs",
        [*head, "tensors"],
        [
            [
                str(own.layer),
                percent_of(own.before),
                percent_of(own.after),
                *([percent_of(own.fit_before), percent_of(own.fit_after)] if fitted else []),
                str(own.tensors),
            ]
            for own in known
        ],
    )


def _notes(report: DamReport, known: list[LayerLoss]) -> list[str]:
    notes = []
    result = report.result
    if result is not None and result.name.startswith("logits"):
        notes.append(
            "These are the errors of the layer fit. The end-to-end fit went on from there; its "
            "effect shows in the KL of the whole model."
        )
    if any(own.fit_before is None for own in known):
        notes.append(
            "Errors on the text of the fit are shown where the fit knows them for all modules: not "
            "in the sensitivity metric, whose sums would cost much."
        )
    return notes
