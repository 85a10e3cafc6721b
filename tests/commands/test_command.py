"""The stock commands, as users run them: mergekit-yaml, mergekit-multi, and our own way in."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from click.testing import CliRunner, Result
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main as mergekit_yaml

from tests.kit.environments import installed_environment
from tests.kit.merging import Merged, dam, linear, merge
from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.processes import BIN
from tests.kit.signals import Running
from tests.kit.texts import Calibration, save_calibration


def write(folder: Path, *configurations: dict[str, Any]) -> Path:
    """Write configurations as one YAML file."""
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump_all(configurations), encoding="utf-8")
    return path


def invoke(*arguments: str | Path) -> Result:
    """Run mergekit-yaml's own click command in this process."""
    LoaderCache.loaders.clear()
    return CliRunner().invoke(mergekit_yaml, list(map(str, arguments)))


def run(
    *command: str | Path, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, by default one that has to succeed."""
    result = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


class TestBadConfiguration:
    """One that mergekit itself takes: our message, and nothing else."""

    @pytest.fixture
    def configuration(self, llama_models: Models, calibration: Calibration) -> dict[str, Any]:
        return dam(llama_models.models, calibration, sampels=4)

    MESSAGE = (
        "Error: 1 problem in the dam configuration:\n"
        "  - parameters (top level): unknown parameter `sampels`; did you mean `samples`?\n"
    )

    def test_prints_the_message_and_exits_with_1(
        self, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        result = invoke(write(tmp_path, configuration), tmp_path / "out")
        assert (result.exit_code, result.output) == (1, self.MESSAGE)
        assert not (tmp_path / "out").exists()

    def test_keys_that_mergekit_drops_are_reported(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration, settings={"samples": 8, "dtpye": 1})
        result = invoke(write(tmp_path, configuration), tmp_path / "out")
        assert result.exit_code == 1
        assert "`samples` stands outside of `parameters:`; move it inside" in result.output
        assert "unknown key `dtpye`; did you mean `dtype`?" in result.output

    def test_bad_text_too(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, ["gone.jsonl", calibration[1]])
        result = invoke(write(tmp_path, configuration), tmp_path / "out")
        assert result.exit_code == 1
        assert result.output.startswith(
            f"Error: 1 problem in the dam configuration:\n  - calibration of "
            f"{llama_models.models[0]}: 'gone.jsonl': no file"
        )
        assert result.output.count("\n") == 2

    def test_bad_text_of_every_model_is_told_with_all_else_that_is_wrong(
        self, llama_models: Models, tmp_path: Path
    ) -> None:
        text = tmp_path / "text.txt"
        text.write_text("Some text.\n")
        texts = [f"{text}:sampels=2", None]
        configuration = dam(llama_models.models, texts, settings={"dtpye": 1}, ridge=-1)
        sources = [str(text), "gone.jsonl", "lost.jsonl"]
        configuration["models"][1]["parameters"] = {"calibration": sources}
        result = invoke(write(tmp_path, configuration), tmp_path / "out")
        assert result.exit_code == 1
        assert result.output.startswith("Error: 5 problems in the dam configuration:\n")
        for said in ("`sampels`", "'gone.jsonl'", "'lost.jsonl'", "`dtpye`", "`ridge` is -1"):
            assert said.replace("`sampels`", "unknown option 'sampels'") in result.output

    @pytest.mark.slow
    def test_has_no_traceback_in_a_process_of_its_own(
        self, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        path = write(tmp_path, configuration)
        result = run(BIN / "mergekit-yaml", path, tmp_path / "out", check=False)
        assert (result.returncode, result.stdout, result.stderr) == (1, "", self.MESSAGE)
        assert not (tmp_path / "out").exists()


class TestProgress:
    def test_shows_the_block_and_its_loss(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration, head=False)
        with mock.patch("mergekit_dam.display.plain.EVERY", 0.0):  # seconds between two lines
            result = invoke(write(tmp_path, configuration), tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert "phases: " in result.output
        for block in ("block 1/2", "block 2/2"):
            shown = rf"{block} mlp\.down_proj\.weight [\d.]+ -> [\d.]+"
            assert re.search(shown, result.output), result.output

    @pytest.mark.parametrize("fit", [{}, {"objective": "layer+logits", "steps": 1}], ids=str)
    def test_quiet_prints_what_linear_prints(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        fit: dict[str, Any],
    ) -> None:
        outputs = []
        for configuration in (
            linear(llama_models.models),
            dam(llama_models.models, calibration, head=False, **fit),
        ):
            path = write(tmp_path, configuration)
            result = invoke(path, tmp_path / configuration["merge_method"], "--quiet")
            assert result.exit_code == 0, result.output
            outputs.append(result.output)
        assert outputs[1] == outputs[0]

    def test_verbosity_tells_where_the_text_came_from(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        with caplog.at_level("INFO"):
            merge(dam(llama_models.models, calibration, head=False), tmp_path / "out")
        said = f"calibration of {llama_models.models[0]}: read as text, 64 documents; 4 sequences"
        assert f"{said} of 16 tokens" in caplog.text


class TestMultipleSteps:
    def test_mergekit_multi_merges_with_dam_what_it_merged_before(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        from mergekit.scripts.multimerge import main as mergekit_multi

        first = {"name": "average", **linear(llama_models.models)}
        last = dam([Path("average"), llama_models.models[1]], calibration, head=False)
        LoaderCache.loaders.clear()
        path, steps, out = write(tmp_path, first, last), tmp_path / "steps", tmp_path / "out"
        arguments = [path, "--intermediate-dir", steps, "--out-path", out, "--quiet"]
        result = CliRunner().invoke(mergekit_multi, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        merged = Merged(out)
        assert merged.coefficients.sources[0] == "steps/average"
        assert merged.coefficients.sources[1].endswith(llama_models.models[1].name)
        merged.load()


@pytest.mark.slow
class TestProcesses:
    @pytest.fixture(scope="class")
    @classmethod
    def configuration(cls, llama_models: Models, calibration: Calibration) -> dict[str, Any]:
        return dam(llama_models.models, calibration, samples=8)

    def test_every_way_in_and_every_hash_seed_write_the_same_bytes(
        self, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        path = write(tmp_path, configuration)
        ways: list[tuple[str | Path, ...]] = [
            (BIN / "mergekit-yaml",),
            (sys.executable, "-m", "mergekit.scripts.run_yaml"),
            (BIN / "mergekit-dam", "merge"),
        ]
        bare = merge(configuration, tmp_path / "in process")
        for index, way in enumerate(ways):
            out = tmp_path / str(index)
            options = ("--quiet", "--num-threads", "1")
            result = run(*way, path, out, *options, PYTHONHASHSEED=str(index + 1))
            assert (result.stdout, _without_stock_noise(result.stderr)) == ("", "")
            assert Merged(out).model_bytes == bare.model_bytes
            # Models are named relative to the file, of which mergekit's module tells nothing.
            like = bare if way[0] == sys.executable else Merged(tmp_path / "0")
            assert Merged(out).coefficient_bytes == like.coefficient_bytes
            assert (out / "README.md").read_text("utf-8").count("library_name: transformers") == 1

    def test_other_methods_are_left_alone(self, llama_models: Models, tmp_path: Path) -> None:
        path = write(tmp_path, linear(llama_models.models))
        unhooked = (
            "import sys\n"
            "for finder in list(sys.meta_path):\n"
            "    if type(finder).__module__.startswith('mergekit_dam'):\n"
            "        sys.meta_path.remove(finder)\n"
            "from mergekit.scripts.run_yaml import main\n"
            "from mergekit import merge_methods\n"
            "assert 'dam' not in {m.spec.name for m in merge_methods.registered_methods()}\n"
            "main()\n"
        )
        with_plugin, without = tmp_path / "with" / "out", tmp_path / "without" / "out"
        run(sys.executable, "-c", unhooked, path, without, "--quiet")
        run(BIN / "mergekit-yaml", path, with_plugin, "--quiet")
        assert content(with_plugin) == content(without)

    @pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send on Windows")
    @pytest.mark.parametrize("existing", [False, True])
    def test_an_interrupt_leaves_nothing_half_written(self, tmp_path: Path, existing: bool) -> None:
        models = save_models(tmp_path, tiny_llama_config(num_hidden_layers=12), count=2)
        text = save_calibration(tmp_path / "text.jsonl")
        path = write(tmp_path, dam(models.models, [text, text]))
        out = tmp_path / "out"
        if existing:
            out.mkdir()
            (out / "notes.txt").write_text("mine")
        # Shards of nothing: every merged tensor is written at once.
        command: list[str | Path] = [BIN / "mergekit-yaml", path, out, "--out-shard-size", "1"]
        running = Running(command, tmp_path / "log")
        running.wait(lambda: len(list(tmp_path.glob(".dam-*/**/model-*"))) > 3)
        running.send(signal.SIGINT)
        # Whatever it says: safetensors turns an interrupt in its own code into an error of its own.
        assert running.finish() != 0
        assert [file.name for file in tmp_path.glob("out/*")] == ["notes.txt"] * existing
        assert out.exists() == existing

    @pytest.mark.parametrize("kind", ["wheel", "editable"])
    def test_an_installed_package_merges(
        self, configuration: dict[str, Any], tmp_path: Path, kind: Any
    ) -> None:
        environment = installed_environment(kind, tmp_path / kind)
        path, out = write(tmp_path, configuration), tmp_path / "out"
        environment.run(environment.script("mergekit-yaml"), path, out, "--quiet")
        Merged(out).load()
        assert Merged(out).entries["lm_head.weight"]["outcome"] == "fitted"


def content(folder: Path) -> dict[str, bytes | list[bytes]]:
    """All files of a folder. The lines of the model card are sorted: mergekit lists models in
    the order of a set, another one in every process."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {n: sorted(c.splitlines()) if n == "README.md" else c for n, c in files.items()}


def _without_stock_noise(stderr: str) -> str:
    """stderr without the lines that every method of mergekit prints there."""
    lines = [line for line in stderr.splitlines() if "`torch_dtype` is deprecated" not in line]
    return "\n".join(lines)
