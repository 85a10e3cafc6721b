"""The backend that a configuration asks for."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mergekit_dam.errors import ConfigError
from mergekit_dam.streams import progress
from mergekit_dam.tracking.choose import require_tracker, tracking
from tests.kit.tracked import curves_of

BACKENDS = pytest.mark.parametrize("name", ["tensorboard", "wandb"])


@BACKENDS
def test_a_package_that_is_there_is_taken(name: Any) -> None:
    require_tracker(name)


@BACKENDS
def test_a_package_that_is_missing_is_named_with_its_extra(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install 'mergekit-dam\[{name}\]'"):
        require_tracker(name)


def test_a_folder_of_runs_by_the_name_of_a_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # as Python imports a folder
    with pytest.raises(ConfigError, match=r"mergekit-dam\[wandb\]"):
        require_tracker("wandb")


def test_nothing_is_imported_where_nothing_is_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    require_tracker("none")
    with tracking("none", {}, (), place=tmp_path / "place", quiet=True):
        progress.track({"loss": 1.0}, step=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_what_was_tracked_is_written_however_the_merge_ends(
    error: type[BaseException] | None, tmp_path: Path
) -> None:
    def merge() -> None:
        with tracking("tensorboard", {"a": 1}, (), place=tmp_path, quiet=True):
            progress.track({"loss": 1.0}, step=0, group="trials")
            if error is not None:
                raise error

    if error is None:
        merge()
    else:
        with pytest.raises(error):
            merge()
    assert curves_of(tmp_path / "run-1")["trials/loss"] == [(0, 1.0)]
    (file,) = tmp_path.rglob("events.*")
    assert file.name.count(".") == 3  # closed: without the name of the machine
