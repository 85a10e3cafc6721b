"""The page: it holds everything itself, and a table stands behind every picture."""

import logging
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.reports import page
from mergekit_dam.reports.page import make_page, render, sections_of
from mergekit_dam.reports.schema import parse
from tests.kit.reports import MODULES, SOURCES, outside, report_values, trial


class Outline(HTMLParser):
    """Tags with their attributes, tables by id as rows of text, and pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table: list[list[str]] | None = None
        self._cell = self._silent = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.tags.append((tag, own))
        self._silent = tag in ("style", "script")
        if tag == "table":
            self._table = self.tables.setdefault(own.get("id") or f"table {len(self.tables)}", [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        self._cell = tag in ("td", "th")
        if self._cell and self._table is not None:
            self._table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._silent = False
        if tag in ("table", "thead"):
            self._cell = False
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text += data
        if self._cell and self._table is not None:
            self._table[-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [own for name, own in self.tags if name == tag]


def made(values: dict[str, Any], name: str = "out") -> str:
    return render(parse(values, "file"), name)


def pictures(html: str) -> list[str]:
    """The pictures with their own text, which other elements repeat in part."""
    return re.findall(r'<div class="picture".*?</div>\n<details>', html, re.DOTALL)


ONE_SWEEP = {"search": [], "parameters": {"objective": "layer", "metric": "identity"}}
REPLAY: dict[str, Any] = {"search": [], "replayed": True, "calibration": {}, "seconds": {}}
KINDS: dict[str, dict[str, Any]] = {"search": {}, "one sweep": ONE_SWEEP, "replay": REPLAY}


def test_eighty_layers_take_less_than_500_kb() -> None:
    assert len(made(report_values(80)).encode()) < 500_000


def test_nothing_is_asked_for_elsewhere() -> None:
    html = made(report_values(3))
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    outline = Outline(html)
    for _, attributes in outline.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert not outline.all("link")
    (policy,) = [m for m in outline.all("meta") if m.get("http-equiv")]
    assert str(policy["content"]).startswith("default-src 'none'")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_report_gives_the_same_page(kind: str) -> None:
    assert made({**report_values(3), **KINDS[kind]}) == made({**report_values(3), **KINDS[kind]})


@pytest.mark.parametrize("kind", KINDS)
def test_every_svg_is_well_formed(kind: str) -> None:
    html = made({**report_values(3), **KINDS[kind]})
    found = re.findall(r"<svg(?:(?!<svg|</svg>).|<svg.*?</svg>)*</svg>", html, re.DOTALL)
    assert len(found) > 5
    for svg in found:
        ET.fromstring(svg)


@pytest.mark.parametrize("kind", KINDS)
def test_behind_every_picture_is_a_table_with_a_value_for_every_mark(kind: str) -> None:
    html = made({**report_values(3), **KINDS[kind]})
    outline, found = Outline(html), pictures(html)
    assert len(found) == len([d for d in outline.all("div") if d.get("class") == "picture"]) > 0
    assert len(outline.all("details")) == len(found)
    for picture in found:
        name = re.findall(r'data-table="([^"]+)"', picture)[0]
        head, *rows = outline.tables[name]
        assert all(len(row) == len(head) for row in rows), name
        if 'data-mode="cells"' in picture:
            drawn = picture.partition('class="cells"')[2]
            assert drawn.count("<rect") == len(rows) * (len(head) - 1), name
        else:
            assert picture.count('class="hit"') == len(rows), name


def test_the_table_of_a_map_says_what_the_report_says() -> None:
    values = report_values(2)
    table = Outline(made(values)).tables["map-2"]
    assert table[0] == ["layer", *MODULES]
    entry = next(t for t in values["tensors"] if t["name"] == "model.layers.1.mlp.up_proj.weight")
    own = entry["coefficients"][SOURCES[2]]
    cell = table[2][1 + MODULES.index("mlp.up_proj")].replace("\u2212", "-")
    said = [float(number) for number in re.findall(r"-?\d+\.\d+", cell)]
    assert said == pytest.approx([own["mean"], own["std"], own["min"], own["max"]], abs=0.006)
    assert table[2][1] == "0.33, average"


def test_a_screen_reader_finds_headings_names_and_titles() -> None:
    outline = Outline(made(report_values(3)))
    assert outline.all("html") == [{"lang": "en"}]
    assert len(outline.all("h1")) == len(outline.all("main")) == 1
    ids = [own["id"] for _, own in outline.tags if "id" in own]
    assert len(set(ids)) == len(ids)
    for section in outline.all("section"):
        assert section["aria-labelledby"] in ids
    for link in outline.all("a"):
        assert str(link["href"])[1:] in ids
    for picture in (own for own in outline.all("div") if own.get("class") == "picture"):
        assert picture["tabindex"] == "0"
        assert picture["aria-label"]
        assert picture["data-table"] in ids
    for svg in outline.all("svg"):
        assert svg.get("role") == "img" or svg.get("aria-hidden") or svg.get("class") == "plot"
    for cell in outline.all("th"):
        assert cell["scope"] in ("col", "row")
    assert any(own.get("aria-live") == "polite" for own in outline.all("div"))


def test_the_summary_comes_first_and_says_what_was_gained() -> None:
    text = " ".join(Outline(made(report_values(3))).text.split())
    assert "55 % nearer to its models than their plain average" in text
    assert "fell from 1.333 to 0.600 nats per token" in text
    assert "This rests on 2,048 held-out tokens per model" in text
    assert text.index("55 % nearer") < text.index("How much of each model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (ONE_SWEEP, "was not judged as a whole. On held-out text, its layers"),
        (REPLAY, "Coefficients were replayed from the file of an earlier merge"),
        ({"search": [trial("start", True, [0.5])]}, "Nothing that was tried came nearer"),
        ({"parameters": {"start": "random"}}, "nearer to its models than the random start"),
        ({"held_out_tokens": {"org/math": 0}}, "No text was held out"),
        ({"held_out_tokens": {"org/math": 512}}, "raise samples or holdout for a firmer verdict"),
        ({"left_out": ["no time for a descent"]}, "no time for a descent"),
    ],
)
def test_the_summary_says_what_there_is_to_say(change: dict[str, Any], said: str) -> None:
    text = " ".join(Outline(made({**report_values(2), **change})).text.split())
    assert said in text


def test_a_merge_that_only_copied_says_so() -> None:
    values = {**report_values(2), **REPLAY, "replayed": False}
    for own in values["tensors"]:
        own["outcome"] = "copied: of one model alone"
        own.pop("held_out_start", None)
        own.pop("correction", None)
    text = Outline(made(values)).text
    assert "Every tensor is a copy of one model's, so there was nothing to learn." in text
    assert "Errors by layer" not in text


def test_a_model_without_layers_has_a_page_without_maps() -> None:
    values = report_values(1)
    values["tensors"] = [outside(SOURCES, "lm_head.weight", "head")]
    names = [section.name for section in sections_of(parse(values, "file"))]
    assert "coefficients" not in names
    assert made(values)


def test_tensors_of_other_stacks_are_counted() -> None:
    values = report_values(2)
    tower = outside(SOURCES, "visual.blocks.0.attn.qkv.weight", "other")
    values["tensors"].append({**tower, "outcome": "averaged: outside of the decoder"})
    text = " ".join(Outline(made(values)).text.split())
    assert "Not shown: 1 tensor of other parts, such as a vision tower." in text
    assert "1: outside of the decoder" in text


def test_names_are_text_and_never_markup() -> None:
    sources = ("org/<script>alert(1)</script>", "org/a&b", 'org/"quoted"', "org/base")
    html = made(report_values(2, sources), "<b>name</b>")
    assert len(Outline(html).all("script")) == 1
    assert "<b>name" not in html
    assert "a&amp;b" in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert "<script" not in svg


def test_paths_of_text_are_names_of_files() -> None:
    html = made(report_values(2))
    assert "words.jsonl" in html
    assert "/home/someone" not in html


def test_a_page_that_cannot_be_made_does_not_undo_a_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("of all things")

    monkeypatch.setattr(page, "read", broken)
    with caplog.at_level(logging.WARNING):
        make_page(tmp_path / "out")
    assert "dam_report.html could not be made" in caplog.text
    assert "of all things" in caplog.text


def test_a_full_disk_is_an_error_as_for_every_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "read", full)
    with pytest.raises(OSError, match="No space left"):
        make_page(tmp_path / "out")
