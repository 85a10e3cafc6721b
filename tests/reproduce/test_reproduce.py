"""`mergekit-dam reproduce`: a merge made again from its lock."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mergekit_dam.cli import main
from mergekit_dam.lock.schema import LOCK_NAME
from tests.kit.adapters import save_adapter
from tests.kit.merging import dam, merge
from tests.kit.models import MLP, Models
from tests.kit.projects import FITS, Project, save_project
from tests.kit.texts import Calibration


def reproduce(lock: Path, *options: object) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was printed; errors are under "error"."""
    done = CliRunner().invoke(main, ["reproduce", str(lock), "--json", *map(str, options)])
    if done.exit_code and not done.stdout:
        return done.exit_code, {"error": done.stderr}
    return done.exit_code, json.loads(done.stdout)


def scale(file: Path, tensor: str, factor: float) -> None:
    tensors = load_file(file)
    tensors[tensor] *= factor
    save_file(tensors, file, metadata={"format": "pt"})


class TestReplay:
    @pytest.mark.parametrize("by", ["", LOCK_NAME])
    def test_gives_the_same_bytes_without_text(self, project: Project, by: str) -> None:
        shutil.rmtree(project.root / "texts")
        code, told = reproduce(project.out.path / by)
        assert code == 0, told
        assert told["byte_identical"]
        assert told["tensors"] == len(project.out.tensors)

    def test_keeps_the_model_where_it_is_asked_to(self, project: Project, tmp_path: Path) -> None:
        code, _ = reproduce(project.out.path, "--to", tmp_path / "again")
        assert code == 0
        again = tmp_path / "again"
        for file in ("model.safetensors", "dam_coefficients.safetensors", "tokenizer.json"):
            assert (again / file).read_bytes() == (project.out.path / file).read_bytes()
        # The lock of a replay is one, too.
        assert reproduce(again, "--models", project.root)[0] == 0

    @pytest.mark.parametrize("stays", [True, False])
    def test_tells_what_to_do_with_a_folder_that_stays(
        self, project: Project, tmp_path: Path, stays: bool
    ) -> None:
        place = tmp_path / "made again"
        options = ["--to", str(place)] if stays else []
        done = CliRunner().invoke(main, ["reproduce", str(project.out.path), *options])
        assert done.exit_code == 0, done.output
        assert "tensors were merged with the coefficients of an earlier merge" in done.stderr
        assert (f"mergekit-dam evaluate '{place}' --data" in done.stderr) is stays
        assert (f"mergekit-dam reproduce '{place / LOCK_NAME}'" in done.stderr) is stays
        assert ("written to" in done.stderr) is stays

    def test_finds_models_that_were_moved(self, project: Project, tmp_path: Path) -> None:
        shutil.move(project.root / "models", tmp_path / "store")
        code, told = reproduce(project.out.path)
        assert code == 1
        assert "models/base: found at none of" in told["error"]
        assert "--models models/base=PATH" in told["error"]
        assert reproduce(project.out.path, "--models", tmp_path / "store")[0] == 0
        shutil.move(tmp_path / "store" / "model_0", tmp_path / "elsewhere")
        moved = ["--models", tmp_path / "store", "--models"]
        code, told = reproduce(project.out.path, *moved, f"models/model_0={tmp_path / 'elsewhere'}")
        assert code == 0, told

    def test_of_a_lock_far_from_its_models_needs_their_place(
        self, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        far = shutil.copytree(project.out.path, tmp_path / "a" / "b" / "c" / "d" / "e")
        assert reproduce(far)[0] == 1
        assert reproduce(far, "--models", project.root)[0] == 0
        monkeypatch.chdir(project.root)
        assert reproduce(far)[0] == 0

    def test_refuses_a_model_that_was_trained_on(self, project: Project) -> None:
        scale(project.root / "models" / "model_1" / "model.safetensors", MLP, 1.01)
        code, told = reproduce(project.out.path)
        assert code == 1
        assert "models/model_1: model.safetensors in" in told["error"]
        assert "in the lock" in told["error"]

    @pytest.mark.parametrize(
        "name", ["dam_coefficients.safetensors", "dam_corrections.safetensors"]
    )
    def test_refuses_coefficients_that_are_not_those_of_the_merge(
        self, project: Project, name: str
    ) -> None:
        file = project.out.path / name
        file.write_bytes(file.read_bytes()[:-4] + b"abcd")
        code, told = reproduce(project.out.path)
        assert code == 1
        assert f"{name}: not the file of the merge" in told["error"]
        file.unlink()
        assert "needs the coefficients" in reproduce(project.out.path)[1]["error"]

    def test_needs_no_weights_beside_the_lock(self, project: Project) -> None:
        (project.out.path / "model.safetensors").unlink()
        assert reproduce(project.out.path)[0] == 0

    def test_says_which_tensors_differ_and_by_how_much(self, project: Project) -> None:
        lock = project.out.path / LOCK_NAME
        file = project.out.path / "model.safetensors"
        before = load_file(file)
        after = {**before, MLP: before[MLP] + torch.eye(*before[MLP].shape) / 8}
        save_file(after, file, metadata={"format": "pt"})
        values = json.loads(lock.read_text("utf-8"))
        values["output"]["tensors"][MLP]["sha256"] = 64 * "0"
        lock.write_text(json.dumps(values), encoding="utf-8")
        code, told = reproduce(project.out.path)
        assert (code, told["byte_identical"]) == (1, False)
        (difference,) = told["differences"]
        assert (difference["what"], difference["name"]) == ("tensor", MLP)
        assert difference["largest"] == pytest.approx(0.125, rel=1e-5)
        own = (after[MLP] - before[MLP]).double().norm() / after[MLP].double().norm()
        assert difference["relative"] == pytest.approx(own.item(), rel=1e-6)


@pytest.mark.slow
class TestRefit:
    @pytest.mark.parametrize("fit", FITS)
    def test_gives_the_same_bytes(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        fit: str,
    ) -> None:
        project = save_project(tmp_path / "project", llama_models, calibration)
        project.merge(monkeypatch, **FITS[fit])
        for options in ([], ["--refit"]):
            code, told = reproduce(project.out.path, *options)
            assert code == 0, told
        (project.out.path / "dam_coefficients.safetensors").unlink()
        assert reproduce(project.out.path, "--refit")[0] == 0

    def test_needs_the_text_of_the_merge(self, project: Project, tmp_path: Path) -> None:
        text = project.root / "texts" / "calibration_0.jsonl"
        store = tmp_path / "far" / "away"
        store.mkdir(parents=True)
        shutil.move(project.root / "texts", store / "texts")
        code, told = reproduce(project.out.path, "--refit")
        assert code == 1
        assert "texts/calibration_0.jsonl: a fit needs this text" in told["error"]
        assert reproduce(project.out.path, "--refit", "--texts", store)[0] == 0
        shutil.copy(store / "texts" / "calibration_1.jsonl", store / "texts" / text.name)
        code, told = reproduce(project.out.path, "--refit", "--texts", store)
        assert code == 1
        assert "calibration of models/model_0: the token ids have sha256" in told["error"]

    def test_of_a_replay_is_refused(self, project: Project, tmp_path: Path) -> None:
        assert reproduce(project.out.path, "--to", tmp_path / "again")[0] == 0
        code, told = reproduce(tmp_path / "again", "--refit")
        assert code == 1
        assert "were replayed, not fitted" in told["error"]

    def test_of_text_that_a_model_wrote_is_written_again(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configuration = yaml.safe_load((project.root / "dam.yaml").read_text("utf-8"))
        configuration["models"][0]["parameters"]["calibration"] = "self"
        (project.root / "dam.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
        project.merge(monkeypatch)
        assert reproduce(project.out.path, "--refit")[0] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("alone", [False, True])
def test_adapters_are_found_and_merged_again(
    llama_models: Models, calibration: Calibration, tmp_path: Path, alone: bool
) -> None:
    adapter = save_adapter(llama_models.base, tmp_path / "adapter")
    first = adapter if alone else Path(f"{llama_models.base}+{adapter}")
    merge(dam([first, llama_models.models[1]], calibration, head=False), tmp_path / "out")
    places = ("--models", llama_models.base.parent, "--texts", calibration[0].parent)
    for options in (places, ("--refit", *places)):
        code, told = reproduce(tmp_path / "out", *options)
        assert code == 0, told
    save_adapter(llama_models.base, adapter, seed=1)
    code, told = reproduce(tmp_path / "out", *places)
    assert code == 1
    assert "adapter: adapter_model.safetensors in" in told["error"]


def test_options_that_exclude_each_other_are_refused(project: Project) -> None:
    done = CliRunner().invoke(
        main, ["reproduce", str(project.out.path), "--cuda", "--device", "cpu"]
    )
    assert done.exit_code == 2
