"""Pictures: marks stand where their numbers say."""

import re
import xml.etree.ElementTree as ET

import pytest

from mergekit_dam.reports.pictures.bars import Row, bars, pairs
from mergekit_dam.reports.pictures.colours import DARK, LIGHT, STEPS, colours
from mergekit_dam.reports.pictures.heatmap import heatmap, most_of, step_of
from mergekit_dam.reports.pictures.lines import HEIGHT, LEFT, TOP, Line, lines, scale
from mergekit_dam.reports.pictures.sheet import sheet
from mergekit_dam.reports.words import number, percent_of, size


@pytest.mark.parametrize(
    ("value", "step"),
    [(0.0, "z"), (0.05, "z"), (1.0, "p8"), (9.0, "p8"), (-1.0, "n8"), (0.5, "p4"), (None, "none")],
)
def test_a_value_has_the_step_that_is_nearest(value: float | None, step: str) -> None:
    assert step_of(value, 1.0) == step


@pytest.mark.parametrize("largest", [0.0, 1e-4, 0.37, 0.5, 1.0, 1.01, 42.0])
def test_scales_end_at_or_just_above_the_largest_value(largest: float) -> None:
    assert largest <= most_of(largest) <= max(2 * largest, 1e-6)


def test_cells_are_drawn_row_by_row() -> None:
    drawn = ET.fromstring(heatmap([["p1", "p2"], ["n1", "none"]], [0, 1], "title"))
    rows = drawn.findall("g")
    assert [[cell.get("class") for cell in row] for row in rows] == [["p1", "p2"], ["n1", "none"]]
    assert [cell.get("x") for cell in rows[0]] == ["0%", "50%"]
    assert drawn.findtext("title") == "title"


@pytest.mark.parametrize("stops", [LIGHT, DARK], ids=["light", "dark"])
def test_every_step_has_a_colour_of_its_own(stops: dict[str, tuple[str, ...]]) -> None:
    found = colours(stops)
    assert len(set(found.values())) == len(found) == 2 * STEPS + 1
    assert (found["p1"], found[f"p{STEPS}"]) == (stops["p"][0], stops["p"][-1])


def test_pairs_have_one_scale() -> None:
    drawn = ET.fromstring(
        pairs([Row("a", "", (2.0, 1.0), "s0"), Row("b", "", (1.0, 0.5), "s1")], "title")
    )
    at = [float(str(circle.get("cx")).rstrip("%")) for circle in drawn.findall("circle")]
    assert at == pytest.approx([99, 50, 50, 25.5])


def test_a_pair_without_a_value_has_no_mark() -> None:
    drawn = ET.fromstring(pairs([Row("a", "", (2.0, None), "s0")], "title"))
    assert drawn.findall("circle") == []


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Row("a", "", (4.0,), "s0"), Row("b", "", (1.0,), "s0"), Row("c", "", (None,), "s0")]
    drawn = ET.fromstring(bars(rows, "title"))
    wide = [r.get("width") for r in drawn.findall("rect") if str(r.get("class")).startswith("bar")]
    assert wide == ["100%", "25%"]


def test_all_values_of_zero_are_drawn() -> None:
    ET.fromstring(bars([Row("a", "", (0.0,), "s0")], "title"))
    ET.fromstring(pairs([Row("a", "", (0.0, 0.0), "s0")], "title"))
    ET.fromstring(lines([Line("s0", [0.0, 0.0])], [0, 1], "title"))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-0.6, 0.7), (0.0, 0.0), (-3.0, -1.0), (1e-6, 3e-6), (-8, 120)]
)
def test_scales_of_lines_hold_all_values_and_zero(low: float, high: float) -> None:
    first, last, step = scale(low, high)
    assert first <= min(low, 0) <= max(high, 0) <= last
    assert 1 <= round((last - first) / step) <= 6


def test_a_line_goes_through_its_values_and_stops_where_there_is_none() -> None:
    drawn = ET.fromstring(lines([Line("s0", [0.0, None, 1.0, 0.5])], [0, 1, 2, 3], "title"))
    (path,) = drawn.iter("path")
    points = re.findall(r"([ML])([\d.]+) ([\d.]+)", str(path.get("d")))
    assert [pen for pen, _, _ in points] == ["M", "M", "L"]
    places = [100 * (LEFT + (1 - LEFT) * (k + 0.5) / 4) for k in (0, 2, 3)]
    assert [float(x) for _, x, _ in points] == pytest.approx(places, abs=0.01)
    assert [y for _, _, y in points] == ["100", "0", "50"]
    heights = [float(str(circle.get("cy"))) for circle in drawn.iter("circle")]
    assert heights == pytest.approx([TOP + HEIGHT, TOP, TOP + HEIGHT / 2])


def test_the_sheet_is_an_svg_file_with_all_its_colours() -> None:
    text = sheet(
        {"a <b>": [["p1"]], "c": [["n1"]]}, ["q_proj"], [0], key=[("p8", "much")], widest=46
    )
    drawn = ET.fromstring(text)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    assert [own.text for own in drawn.iter() if own.text in ("a <b>", "c", "much")] == [
        "a <b>",
        "c",
        "much",
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (0.0, "0.000"), (-0.0001, "−1.0e-04"), (1.2345, "1.234"), (-12.0, "−12.0")],  # noqa: RUF001
)
def test_numbers_are_short(value: float | None, said: str) -> None:
    assert number(value) == said


@pytest.mark.parametrize(
    ("fraction", "said"),
    [(0.8512, "85 %"), (-0.8, "−80 %"), (0.0432, "4.3 %"), (0.0, "0 %")],  # noqa: RUF001
)
def test_fractions_are_percentages(fraction: float, said: str) -> None:
    assert percent_of(fraction) == said


@pytest.mark.parametrize(
    ("count", "said"), [(988913664, "988.9 MB"), (12, "12 B"), (5e12, "5.0 TB")]
)
def test_bytes_have_units(count: float, said: str) -> None:
    assert size(count) == said
