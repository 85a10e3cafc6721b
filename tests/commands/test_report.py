"""`mergekit-dam report`: the page again, a picture, and the numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mergekit_dam.cli import main
from tests.kit.reports import SOURCES, report_values


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "dam_report.json").write_text(json.dumps(report_values(3)), "utf-8")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_page_is_made_again(out: Path) -> None:
    result = run(out)
    assert result.exit_code == 0, result.output
    page = out / "dam_report.html"
    assert result.output == f"{page}\n"
    first = page.read_bytes()
    assert b"<title>out: report of a dam merge</title>" in first
    page.unlink()
    run(out)
    assert page.read_bytes() == first


def test_the_page_goes_where_it_is_asked_to(out: Path, tmp_path: Path) -> None:
    run(out)
    result = run(out, "--html", tmp_path / "elsewhere.html")
    assert result.exit_code == 0
    assert (tmp_path / "elsewhere.html").read_bytes() == (out / "dam_report.html").read_bytes()


def test_the_numbers_are_json_and_nothing_is_written(out: Path) -> None:
    result = run(out, "--json")
    assert result.exit_code == 0
    numbers = json.loads(result.output)
    assert numbers["summary"]["mean"]["after"] == pytest.approx(0.6)
    assert numbers["layers"] == [0, 1, 2]
    assert list(numbers["mean_coefficients"]) == list(SOURCES)
    assert [own["layer"] for own in numbers["losses"]] == [0, 1, 2]
    assert [path.name for path in out.iterdir()] == ["dam_report.json"]


def test_the_picture_is_a_png(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(out, "--png", tmp_path / "map.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "dam_report.html").exists()


def test_a_picture_without_matplotlib_names_the_extra(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(out, "--png", tmp_path / "map.png")
    assert result.exit_code == 1
    assert "pip install 'mergekit-dam[plot]'" in result.output


def test_a_format_that_there_is_none_of_is_refused(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(out, "--png", tmp_path / "map.nonesuch")
    assert result.exit_code == 1
    assert "required a file that can be written" in result.output


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "dam_report.json: no such file; name the folder of a dam merge" in result.output


def test_a_page_that_cannot_be_written_is_refused(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(out, "--html", tmp_path / "file/page.html")
    assert result.exit_code == 1
    assert "page.html" in result.output
    assert "name another one" in result.output


def test_help_needs_neither_torch_nor_mergekit() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from mergekit_dam.cli import main\n"
        "result = CliRunner().invoke(main, ['report', '--help'])\n"
        "assert result.exit_code == 0 and '--png' in result.output, result.output\n"
        "print(sorted({'torch', 'jinja2', 'mergekit', 'pydantic'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
