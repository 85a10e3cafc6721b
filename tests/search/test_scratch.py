"""A search leaves no scratch files, however it ends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.errors import DamError
from mergekit_dam.journal import Journal
from mergekit_dam.search import descents as descents_module
from mergekit_dam.search.search import search
from mergekit_dam.streams import progress
from tests.kit.models import Models
from tests.kit.networks import files_under, make
from tests.kit.searches import polished, searched
from tests.kit.settings import run_settings
from tests.kit.texts import Calibration


class Interrupted(BaseException):
    """Like Ctrl-C, which would end the tests."""


@pytest.mark.parametrize("at", ["start", "block", "step", None])
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, DamError])
def test_scratch_files_go_away_whatever_happens(
    at: str | None,
    error: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[set[str]] = []

    def show(line: str, **_: object) -> None:
        seen.append(files_under(tmp_path))
        if at is not None and line.startswith(at) and len(seen) > 1:
            raise error("no more")

    monkeypatch.setattr(progress, "show", show)
    made = make()
    if at is None:
        searched(made, tmp_path / "scratch", metric="sensitivity")
        assert any(name.endswith(".safetensors") for files in seen for name in files)
    else:
        with pytest.raises(error):
            searched(made, tmp_path / "scratch", metric="sensitivity")
    assert all(name.startswith("scratch") for files in seen for name in files)
    assert files_under(tmp_path) == {"scratch"}


def test_a_merge_that_ends_early_leaves_what_the_next_one_needs_alone(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(descents_module, "descend", fail)
    with pytest.raises(KeyboardInterrupt):
        polished(llama_models, calibration, tmp_path / "out")
    states = {"depends_on.json", "layer-identity-00004.safetensors", "trials.safetensors"}
    kept = (tmp_path / ".dam-out" / "kept").iterdir()
    assert {path.name for path in kept if path.is_file()} == states
    assert not any((tmp_path / ".dam-out" / "kept" / ".dam-entered").iterdir())
    with pytest.raises(KeyboardInterrupt):
        polished(llama_models, calibration, tmp_path / "afresh", resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {".dam-out"}


def test_weights_that_were_kept_are_let_go_of(tmp_path: Path) -> None:
    made = make()
    network = made.network("always")
    settings = run_settings(metric="sensitivity")
    journal = Journal(tmp_path, keeps=False)
    search(network, made.streams(), settings, made.average(), journal=journal)
    assert not any(network.keeps_on_device(number) for number in range(len(network.stages)))
