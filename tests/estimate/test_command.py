"""The command `plan`: it prints what a merge will cost, and reads no weight."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache

from mergekit_dam.cli import main
from tests.kit.estimates import SPEEDS
from tests.kit.merging import dam
from tests.kit.models import Models, save_models, tiny_llama_config


def _computing(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    """Products in half precision, as two estimates have them."""
    for own, found in zip(one["work"], other["work"], strict=True):
        assert (own["kind"], own["count"]) == (found["kind"], found["count"])
        if own["speed"] == "forward":
            yield own, found


class TestCommand:
    def run(self, file: Path, *arguments: str | Path) -> Any:
        LoaderCache.loaders.clear()
        quick = mock.patch("mergekit_dam.estimate.estimate.calibrate", return_value=SPEEDS)
        with quick, mock.patch.object(LazyTensorLoader, "get_tensor", side_effect=AssertionError):
            return CliRunner().invoke(main, ["plan", *map(str, (file, *arguments))])

    @pytest.fixture
    def file(self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]) -> Path:
        file = tmp_path / "dam.yaml"
        configuration = dam(llama_models.models, calibration, objective="layer+logits", steps=3)
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        return file

    def test_it_prints_tables(self, file: Path, tmp_path: Path) -> None:
        result = self.run(file, str(tmp_path / "out"))
        assert result.exit_code == 0, result.output
        for shown in ("2 sources of 2 blocks", "survey", "descent, 3 steps", "peak", "in all"):
            assert shown in result.output
        assert not (tmp_path / "out").exists()

    def test_it_prints_json(self, file: Path) -> None:
        result = self.run(file, "--json")
        told = json.loads(result.stdout)
        assert told["blocks"] == 2
        assert [sweep["name"] for sweep in told["sweeps"]] == [
            "survey",
            "layer fits, identity",
            "descent, 3 steps",
            "merge and write",
        ]
        least = told["startup_seconds"] + sum(sweep["seconds"] for sweep in told["sweeps"])
        assert told["seconds"]["least"] == pytest.approx(least)
        assert told["peak_host_bytes"] == max(p["host_bytes"] for p in told["memory"])

    def test_a_gpu_that_is_not_here(self, file: Path) -> None:
        told = {}
        for gpu in ("h100", "rtx4090"):
            result = self.run(file, "--gpu", gpu, "--json")
            assert result.exit_code == 0, result.output
            told[gpu] = json.loads(result.stdout)
        fast, small = told["h100"], told["rtx4090"]
        assert fast["machine"]["gpu"] == 80e9
        assert small["peak_gpu_bytes"] == fast["peak_gpu_bytes"] > 0
        assert all(own["seconds"] > found["seconds"] for own, found in _computing(small, fast))
        said = self.run(file, "--gpu", "H100").output
        assert "published rates of an h100 of 80.00 GB" in " ".join(said.split())
        result = self.run(file, "--gpu", "h100", "--cuda")
        assert result.exit_code == 2
        assert "give one of them" in result.output

    def test_a_gpu_that_is_not_here_has_the_memory_that_the_merge_may_use(self, file: Path) -> None:
        configuration = yaml.safe_load(file.read_text("utf-8"))
        configuration["parameters"]["gpu_memory"] = "100kB"
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        assert "the merge may use 0.0 GB" in self.run(file, "--gpu", "h100").output

    def test_an_output_that_a_merge_may_not_write_to_is_refused(
        self, file: Path, tmp_path: Path
    ) -> None:
        model = Path(yaml.safe_load(file.read_text("utf-8"))["models"][0]["model"])
        taken = tmp_path / "taken"
        taken.write_text("")
        for output, said in ((model, "apart from the models"), (taken, "is a file")):
            result = self.run(file, output)
            assert result.exit_code == 1
            assert said in result.stderr

    def test_json_has_no_speed_of_a_disk_that_cannot_be_written(self, file: Path) -> None:
        with mock.patch("tempfile.TemporaryFile", side_effect=OSError):
            result = self.run(file, "--gpu", "h100", "--json")
        told = json.loads(result.stdout, parse_constant=pytest.fail)
        assert told["machine"]["read"] is None

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("merge_method: [", "expected the node content"),
            (
                "merge_method: linear\nmodels:\n- model: a/b\n",
                "required `merge_method: dam`, got `linear`",
            ),
            ("merge_method: dam\nmodels:\n- model: a/b\n- model: a/c\n", "required `calibration`"),
        ],
    )
    def test_a_configuration_that_a_merge_would_refuse(
        self, tmp_path: Path, text: str, said: str
    ) -> None:
        file = tmp_path / "dam.yaml"
        file.write_text(text, encoding="utf-8")
        result = self.run(file)
        assert result.exit_code == 1
        assert "in the dam configuration:\n" in result.output
        assert said in result.output

    def test_models_that_differ_are_refused(self, file: Path, tmp_path: Path) -> None:
        configuration = yaml.safe_load(file.read_text("utf-8"))
        other = save_models(tmp_path, tiny_llama_config(num_hidden_layers=3), count=1)
        configuration["models"][1]["model"] = str(other.models[0])
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        assert self.run(file).exit_code == 1

    def test_a_model_that_is_not_there(self, file: Path, tmp_path: Path) -> None:
        configuration = yaml.safe_load(file.read_text("utf-8"))
        configuration["models"][1]["model"] = str(tmp_path / "nothing")
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        result = self.run(file)
        assert result.exit_code == 1
        assert f"Error: {tmp_path / 'nothing'}: required a folder with a model" in result.output

    def test_sequences_that_are_too_long(self, file: Path) -> None:
        configuration = yaml.safe_load(file.read_text("utf-8"))
        configuration["parameters"]["sequence_length"] = 10_000
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        assert "`sequence_length` is 10000, but the model has" in self.run(file).output

    def test_a_gpu_that_is_not_there(self, file: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        result = self.run(file, "--cuda")
        assert result.exit_code == 1
        assert "torch finds no GPU" in result.output

    def test_a_size_that_is_none(self, file: Path) -> None:
        assert "required a number such as 5B" in self.run(file, "--out-shard-size", "much").output
