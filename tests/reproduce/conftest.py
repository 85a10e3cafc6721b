"""A merge with its lock, which tests read and never change."""

import shutil
from pathlib import Path

import pytest

from tests.kit.models import Models
from tests.kit.projects import FITS, Project, save_project
from tests.kit.texts import Calibration


@pytest.fixture(scope="session")
def merged_project(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    project = save_project(tmp_path_factory.mktemp("made") / "project", llama_models, calibration)
    with pytest.MonkeyPatch.context() as patch:
        project.merge(patch, **FITS["layer"])
    return project


@pytest.fixture
def project(merged_project: Project, tmp_path: Path) -> Project:
    """A copy that may be changed."""
    return Project(shutil.copytree(merged_project.root, tmp_path / "project"))
