"""What a package index is told, and what is released."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergekit_dam
from tests.kit.environments import CHECKOUT

REPOSITORY = "https://github.com/mergekit-dam/mergekit-dam"


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    hatch = (sys.executable, "-m", "hatchling", "metadata")
    found = subprocess.run(hatch, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    parsed: dict[str, Any] = json.loads(found.stdout)
    return parsed


def test_the_version_is_one_everywhere(metadata: dict[str, Any]) -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text("utf-8"))
    changes = (CHECKOUT / "CHANGELOG.md").read_text("utf-8")
    latest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", changes, re.MULTILINE)
    assert latest is not None
    assert metadata["version"] == mergekit_dam.__version__ == latest[1] == citation["version"]
    assert str(citation["date-released"]) == latest[2]


def test_the_addresses_are_of_one_repository(metadata: dict[str, Any]) -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text("utf-8"))
    assert metadata["urls"]["Repository"] == citation["repository-code"] == REPOSITORY
    own = {name: url for name, url in metadata["urls"].items() if name != "Paper"}
    assert set(own) == {"Homepage", "Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(REPOSITORY) for url in own.values())


def test_links_of_the_readme_are_absolute_and_lead_to_files_of_the_tag(
    metadata: dict[str, Any],
) -> None:
    own = (CHECKOUT / "README.md").read_text("utf-8")
    shown = metadata["readme"]["text"]
    links = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert len(links) == len(re.findall(r"\]\(([^)\s]+)\)", own))
    place = f"{REPOSITORY}/blob/v{metadata['version']}/"
    files = [link.removeprefix(place).partition("#")[0] for link in links if place in link]
    assert len(files) > 10
    assert all((CHECKOUT / file).exists() for file in files)
    assert all(link.startswith(("https://", "#")) for link in links)
    assert shown.replace(place, "") == own


@pytest.mark.slow
def test_the_sdist_has_what_a_packager_needs_and_nothing_of_this_machine(tmp_path: Path) -> None:
    hatch = (sys.executable, "-m", "hatchling", "build", "--target", "sdist")
    subprocess.run([*hatch, "--directory", tmp_path], cwd=CHECKOUT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "constraints.txt",
        "examples/python.md",
        "hatch_build.py",
        "mergekit_dam/mergekit_dam_autoload.pth",
        "mergekit_dam/reports/templates/page.html.j2",
        "pyproject.toml",
        "tests/conftest.py",
    } <= names
    hidden = {name.split("/")[0] for name in names if name.startswith(".")}
    assert hidden <= {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
