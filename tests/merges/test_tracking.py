"""Whole merges that are tracked, against their reports and against merges that are not."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.layers import fit
from mergekit_dam.reproduce.reproduce import reproduce
from mergekit_dam.reproduce.verify import verify
from tests.kit.descents import plain_rate
from tests.kit.merging import Merged, dam, merge, refused
from tests.kit.models import Models
from tests.kit.processes import finish, start_merges
from tests.kit.resuming import Stopped, configured, contents
from tests.kit.settings import run_settings
from tests.kit.texts import Calibration
from tests.kit.tracked import Curve, curves_of, curves_of_wandb, offline_wandb, text_of

FOLDER = "dam_tracking"
STEPS: dict[str, Any] = {"steps": 4, "learning_rate": 5e-3}
SEARCH: dict[str, Any] = {"objective": "layer+logits", "metric": "sensitivity", **STEPS}
OF_THE_CONFIGURATION = {"mergekit_config.yml", "README.md", "dam_lock.json"}
"""Files that hold the configuration as it was written."""


@pytest.fixture(scope="module")
def configuration(llama_models: Models, calibration: Calibration) -> dict[str, Any]:
    return dam(llama_models.models, calibration, base=llama_models.base, **SEARCH)


def tracked(configuration: Mapping[str, Any], by: str = "tensorboard") -> dict[str, Any]:
    parameters = {**configuration["parameters"], "tracking": by}
    return {**configuration, "parameters": parameters}


@pytest.fixture(scope="module")
def merged(configuration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return merge(tracked(configuration), tmp_path_factory.mktemp("tracked") / "out")


@pytest.fixture(scope="module")
def curves(merged: Merged) -> dict[str, Curve]:
    return curves_of(merged.path / FOLDER / "run-1")


def block_losses(merged: Merged, name: str) -> list[float]:
    """Mean of a loss over the tensors of every block that have one."""
    found = []
    for block in range(2):
        own = [e for n, e in merged.entries.items() if f"layers.{block}." in n and name in e]
        found.append(sum(entry[name] for entry in own) / len(own))
    return found


class TestCurves:
    def test_losses_of_blocks_are_means_of_those_in_the_report(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        one_sweep = dam(llama_models.models, calibration, base=llama_models.base)
        out = merge(tracked(one_sweep), tmp_path / "out")
        own = curves_of(out.path / FOLDER / "run-1")
        for curve, name in (("before", "held_out_start"), ("after", "held_out_fitted")):
            of_parts = dict(own[f"layer_fits/held_out_loss_{curve}"])
            blocks = [of_parts[number] for number in (1, 2)]  # 0 is the input
            assert blocks == pytest.approx(block_losses(out, name), rel=1e-6)

    def test_trials_have_the_divergences_of_the_report(
        self, merged: Merged, curves: dict[str, Curve]
    ) -> None:
        trials = merged.report["search"]
        assert len(trials) >= 3
        for index, name in enumerate(("KL_model_0", "KL_model_1")):
            expected = [trial["held_out_kl"][index] for trial in trials]
            found = [value for _, value in curves[f"trials/{name}"]]
            assert found == pytest.approx(expected, rel=1e-6)
        means = curves["trials/mean_KL"]
        assert [step for step, _ in means] == list(range(len(trials)))
        expected = [trial["mean_held_out_kl"] for trial in trials]
        assert [value for _, value in means] == pytest.approx(expected, rel=1e-6)

    def test_steps_of_a_descent_have_loss_and_rate(self, curves: dict[str, Curve]) -> None:
        settings = run_settings(**STEPS, lr_schedule="cosine")
        rates = curves["descent_of_4_steps/learning_rate"]
        assert [step for step, _ in rates] == [1, 2, 3, 4]
        expected = [plain_rate(settings, step) for step in range(4)]
        assert [rate for _, rate in rates] == pytest.approx(expected, rel=1e-6)
        assert len(curves["descent_of_4_steps/loss"]) == 4

    def test_looks_of_a_descent_lead_to_its_trial(
        self, merged: Merged, curves: dict[str, Curve]
    ) -> None:
        looks = dict(curves["descent_of_4_steps/mean_KL"])
        descent = merged.report["search"][-1]
        best = descent["details"]["best_step"]
        if best:
            assert looks[best] == pytest.approx(descent["mean_held_out_kl"], rel=1e-6)
        assert max(looks) == 4

    def test_phases_rise_and_memory_is_known_at_every_step(self, curves: dict[str, Curve]) -> None:
        phases = [value for _, value in curves["merge/phase"]]
        assert phases == sorted(phases)
        assert len(set(phases)) >= 4
        assert len(curves["merge/memory_bytes"]) == len(phases)
        assert all(value > 0 for _, value in curves["merge/tokens_per_second"])

    def test_the_configuration_is_there_with_defaults_and_without_paths(
        self, merged: Merged, llama_models: Models
    ) -> None:
        text = text_of(merged.path / FOLDER / "run-1", "configuration")
        assert "merge_method: dam" in text
        assert "temperature: 1.0" in text  # a default
        (file,) = (merged.path / FOLDER).rglob("events.*")
        for folder in (llama_models.models[0].parent, merged.path.parent, Path.home()):
            assert str(folder).encode() not in file.read_bytes()


class TestResult:
    def test_has_the_bytes_of_a_merge_that_nothing_tracks(
        self, merged: Merged, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        plain = contents(merge(configuration, tmp_path / "out").path)
        found = {n: own for n, own in contents(merged.path).items() if not n.startswith(FOLDER)}
        assert found.keys() == plain.keys()
        assert {n for n in plain if found[n] != plain[n]} <= OF_THE_CONFIGURATION

    def test_is_as_its_lock_says_whatever_becomes_of_the_events(
        self, merged: Merged, tmp_path: Path
    ) -> None:
        out = shutil.copytree(merged.path, tmp_path / "out")
        assert verify(out, quiet=True).differences == ()
        (file,) = (out / FOLDER).rglob("events.*")
        file.write_bytes(b"")
        assert verify(out, quiet=True).differences == ()
        shutil.rmtree(out / FOLDER)
        assert verify(out, quiet=True).differences == ()

    def test_is_reproduced_without_tracking_and_without_its_package(
        self,
        merged: Merged,
        llama_models: Models,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        models = [str(llama_models.models[0].parent)]
        found = reproduce(merged.path, to=tmp_path / "again", given=models, quiet=True)
        assert found.differences == ()
        assert not (tmp_path / "again" / FOLDER).exists()

    def test_replaces_the_events_of_the_merge_before(
        self, merged: Merged, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        out = shutil.copytree(merged.path, tmp_path / "out")
        merge(configuration, out)
        assert not (out / FOLDER).exists()


def test_a_merge_that_is_stopped_and_continues_has_both_runs(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configuration = tracked(configured(llama_models, calibration, "layer, identity"))
    out, stock = tmp_path / "out", fit._say

    def stopped(stage: Any, *rest: Any) -> None:
        stock(stage, *rest)
        if stage.number == 1:
            raise Stopped

    monkeypatch.setattr("mergekit_dam.journal.SHARE", float("inf"))
    monkeypatch.setattr(fit, "_say", stopped)
    with pytest.raises(Stopped):
        merge(configuration, out)
    kept = tmp_path / ".dam-out" / "kept" / FOLDER
    name = "layer_fits/held_out_loss_after"
    before = curves_of(kept / "run-1")[name]
    assert [step for step, _ in before] == [0, 1]

    monkeypatch.setattr(fit, "_say", stock)
    merge(configuration, out)
    runs = [curves_of(out / FOLDER / f"run-{number}")[name] for number in (1, 2)]
    assert runs[0] == before
    assert [step for step, _ in runs[1]] == [1, 2, 3]  # the input was kept
    assert runs[1][0] == before[1]
    assert not any(tmp_path.glob(".dam-*"))


def test_what_was_tracked_goes_with_a_merge_that_has_nothing_to_continue(
    llama_models: Models, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(fit, "_say", stopped)
    configuration = configured(llama_models, calibration, "layer, identity", resume=False)
    with pytest.raises(Stopped):
        merge(tracked(configuration), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_before_any_weight_is_read(
    name: str, configuration: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    said = f"pip install 'mergekit-dam[{name}]'"
    refused(tracked(configuration, name), tmp_path / "out", f"`tracking: {name}`", said)


def test_without_tracking_neither_package_is_imported(
    llama_models: Models, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    out = merge(dam(llama_models.models, calibration), tmp_path / "out")
    assert not (out.path / FOLDER).exists()


def test_a_run_of_wandb_has_the_curves_of_tensorboard(
    configuration: dict[str, Any], curves: dict[str, Curve], tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()
    with offline_wandb(tmp_path / "wandb"):
        out = merge(tracked(configuration, "wandb"), tmp_path / "out")
    assert not (out.path / FOLDER).exists()
    found = curves_of_wandb(tmp_path / "wandb")
    assert found.keys() == curves.keys()
    for name in (name for name in curves if not name.startswith("merge/")):
        assert [step for step, _ in found[name]] == [step for step, _ in curves[name]]
        values, expected = ([value for _, value in own[name]] for own in (found, curves))
        assert values == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_of_two_processes_the_first_one_alone_is_tracked(
    configuration: dict[str, Any], curves: dict[str, Curve], tmp_path: Path
) -> None:
    finish(start_merges({"out": tracked(configuration)}, tmp_path))
    assert [path.name for path in (tmp_path / "out" / FOLDER).iterdir()] == ["run-1"]
    (file,) = (tmp_path / "out" / FOLDER).rglob("events.*")
    name = "trials/mean_KL"
    found = curves_of(file.parent)[name]
    assert [value for _, value in found] == pytest.approx([v for _, v in curves[name]], rel=1e-3)
