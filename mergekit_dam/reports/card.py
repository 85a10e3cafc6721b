"""The model card: what mergekit has written of the merge, and what the report adds to it."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment

from mergekit_dam.calibration.source import OPTION
from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.reports.depth import coefficient_map, grid_of
from mergekit_dam.reports.names import short_names
from mergekit_dam.reports.pictures.sheet import sheet
from mergekit_dam.reports.schema import DamReport, Text, read
from mergekit_dam.reports.sections.gains import domain_table, headline, sureness
from mergekit_dam.reports.sections.inputs import source_of
from mergekit_dam.reports.sections.maps import (
    WIDEST,
    key_of,
    label_of,
    labels_of,
    scale_end,
    steps_of,
)
from mergekit_dam.reports.spared import merge_spared
from mergekit_dam.reports.summary import Summary, summary_of
from mergekit_dam.reports.words import percent_of
from mergekit_dam.stored import written_whole

CARD_NAME = "README.md"
PICTURE_NAME = "dam_coefficients.svg"

_CONFIGURATION = "### Configuration\n"
"""Heading of mergekit's card, before which the results of the merge stand."""

_ABSOLUTE = re.compile(r"~?/|~\w*$|[A-Za-z]:[\\/]")
_PATH = re.compile(r"(?<![\w./:~<-])~?/(?:[\w.+@-]+/)+[\w.+@-]+")
"""An absolute path of two parts or more; not the rest of an address."""


def complete_card(folder: Path, hub_ids: Sequence[str]) -> None:
    """Complete the model card that mergekit has written, and draw its picture.

    Args:
        folder: Folder of the merged model, with its card and its report.
        hub_ids: Ids on the Hub of the models that were merged; those in local folders have none.

    If that fails, mergekit's card stays as it is.

    Raises:
        OSError: A file cannot be written.
    """
    with merge_spared(f"{CARD_NAME} stays as mergekit has written it, which names local folders"):
        _complete(folder, hub_ids)


def _complete(folder: Path, hub_ids: Sequence[str]) -> None:
    report = read(folder / REPORT_NAME)
    card = ModelCard((folder / CARD_NAME).read_text("utf-8"))
    picture = picture_of(report)
    described(card, report, hub_ids)
    card.text = body(card.text, report, picture is not None)
    with written_whole(folder / CARD_NAME) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    if picture is not None:
        with written_whole(folder / PICTURE_NAME) as temporary:
            temporary.write_text(picture, encoding="utf-8")


def described(card: ModelCard, report: DamReport, hub_ids: Sequence[str]) -> None:
    """Fill in the card's metadata, in the form that the Hub asks for."""
    data: Any = card.data
    data.base_model = list(dict.fromkeys(hub_ids)) or None
    data.base_model_relation = "merge"
    data.datasets = list(dict.fromkeys(_datasets(report.calibration.values()))) or None
    data.tags = list(dict.fromkeys([*(data.tags or []), "mergekit", "merge", "dam"]))


def _datasets(texts: Iterable[Text]) -> Iterable[str]:
    for text in texts:
        yield from _datasets(text.parts)
        if text.dataset is not None:
            yield text.dataset


def body(text: str, report: DamReport, picture: bool) -> str:
    """The text of the card, without paths of this machine.

    Args:
        text: mergekit's text.
        picture: Whether there is a picture of the coefficients.
    """
    before, heading, configuration = text.partition(_CONFIGURATION)
    summary = summary_of(report)
    results, end = (
        _template(name).render(
            report=report,
            summary=summary,
            headline=headline(report, summary),
            sure=sureness(summary),
            losses=domain_table(summary, report.names) if summary.mean else None,
            correction=correction_told(report, summary),
            source_of=source_of,
            picture=PICTURE_NAME if picture else None,
        )
        for name in ("results", "end")
    )
    whole = f"{before.rstrip()}\n\n{results.strip()}\n\n{heading}{configuration.rstrip()}\n\n{end}"
    return without_paths(whole, configuration)


def correction_told(report: DamReport, summary: Summary) -> str:
    """How many weights have a correction, of what size."""
    if not summary.corrected:
        return ""
    own = [t.correction for t in report.tensors if t.correction is not None]
    ranks = {c.whole_rank for c in own if c.whole_rank}
    rank = f" of rank {', '.join(map(str, sorted(ranks)))}" if ranks else ""
    told = f"{summary.corrected:,} weights have a correction{rank}"
    shares = [share for c in own if (share := c.share) is not None]
    size = f", typically {percent_of(median(shares))} of the weight in size" if shares else ""
    return f"{told}{size}. It is part of the weights in this folder."


def picture_of(report: DamReport) -> str | None:
    """The map of the coefficients as an SVG file; None if no tensor is in a layer."""
    grid = grid_of(report)
    if not grid.layers:
        return None
    maps = coefficient_map(report, grid)
    end = scale_end(report, maps)
    return sheet(
        {
            label_of(report, source, report.names): steps_of(rows, end)
            for source, rows in maps.items()
        },
        labels_of(grid),
        grid.layers,
        key=key_of(end),
        widest=WIDEST * len(grid.layers),
    )


def without_paths(text: str, configuration: str) -> str:
    """A text with the ends of absolute paths in place of the whole.

    Args:
        configuration: The part with the YAML, whose values may be paths with spaces.
    """
    block = configuration.partition("```yaml\n")[2].rpartition("```")[0]
    paths = sorted({path for value in _scalars(block) for path in _paths_in(value)})
    named = short_names(paths)
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, named[path])
    return _PATH.sub(lambda found: found[0].rsplit("/", 1)[1], text)


def _scalars(block: str) -> Iterable[str]:
    return [token.value for token in yaml.scan(block) if isinstance(token, yaml.ScalarToken)]


def _paths_in(value: str) -> Iterable[str]:
    """Absolute paths in a value: a model and its adapter, or text and the file of an option."""
    for part in OPTION.split(value):
        for piece in re.split(r"[+=](?=~?/|[A-Za-z]:[\\/])", part):
            if _ABSOLUTE.match(piece) and len(piece) > 2:
                yield piece


@cache
def _template(name: str) -> Any:
    source = resources.files("mergekit_dam.reports") / "templates" / f"card_{name}.md.j2"
    environment = Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source.read_text("utf-8"))
