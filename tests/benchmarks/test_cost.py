"""The benchmark of costs: runs of its merges, and its command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from examples.benchmarks import cost
from examples.benchmarks.measuring.models import Models
from examples.benchmarks.measuring.processes import Measured
from examples.benchmarks.merge_cost import plot
from examples.benchmarks.merge_cost.methods import REPLAY, Choices
from examples.benchmarks.merge_cost.results import LINEAR
from examples.benchmarks.merge_cost.run import measure_costs
from examples.benchmarks.merge_cost.settings import Inputs, Settings, Sweep
from mergekit_dam.errors import DamError
from tests.kit.benchmarks import TINY_SHAPE, cells_of, never
from tests.kit.merging import merge


@pytest.fixture
def settings(tmp_path):
    return Settings(out=tmp_path / "out", samples=2, sequence_length=16, rounds=2, dtype="float32")


@pytest.fixture
def given(llama_models, calibration):
    names = ("first", "second")
    models = Models(dict(zip(names, map(str, llama_models.models), strict=True)))
    return Inputs(models, dict(zip(names, map(str, calibration), strict=True)))


class Recorder:
    """Runs what a command would in this process, and keeps what it was asked for."""

    def __init__(self, failing=()):
        self.failing = failing
        self.commands = []
        self.configurations = []

    @property
    def names(self):
        return [Path(command[4]).name for command in self.commands]

    def __call__(self, command, log):
        configuration = yaml.safe_load(Path(command[3]).read_text())
        self.commands.append(command)
        self.configurations.append(configuration)
        if log.stem in self.failing:
            log.write_text("Loading\nError: no luck\n")
            return Measured(1, 0.5, 1_000_000)
        merge(configuration, Path(command[4]))
        return Measured(0, 2.0, 3_000_000)


QUICK = Choices(only=(REPLAY, "layer_identity"))


class TestRun:
    def test_rows_run_in_turns_and_fits_in_the_first_rounds(self, given, settings):
        run = Recorder()
        found = measure_costs(given, settings, QUICK, run=run)
        turns = ["fit", LINEAR, REPLAY, "layer_identity", LINEAR, REPLAY]
        assert run.names == turns
        (comparison,) = found.comparisons
        assert [len(row.rounds) for row in comparison.rows] == [2, 2, 1]
        assert not any(row.reason for row in comparison.rows)
        assert list((settings.out / "merged").iterdir()) == []
        assert json.loads((settings.out / "cost.json").read_text()) == json.loads(
            json.dumps(found.to_json())
        )
        assert found.tables() in (settings.out / "cost.md").read_text()

    def test_a_fit_of_a_later_round_has_a_linear_beside_it(self, given, settings):
        run = Recorder()
        choices = Choices(only=("layer_identity",))
        one = replace(settings, rounds=1, fit_rounds=2)
        assert measure_costs(given, one, choices, run=run).comparisons[0].rows[0].rounds
        assert run.names == [LINEAR, "layer_identity"] * 2

    def test_every_row_reads_the_base_where_there_is_one(self, given, settings, llama_models):
        base = str(llama_models.base)
        run = Recorder()
        with_base = replace(given, models=replace(given.models, base=base))
        measure_costs(with_base, replace(settings, rounds=1), QUICK, run=run)
        by_name = dict(zip(run.names, run.configurations, strict=True))
        models = [*given.models.specialists.values(), base]
        assert [entry["model"] for entry in by_name[LINEAR]["models"]] == models
        assert "base_model" not in by_name[LINEAR]
        assert by_name[REPLAY]["base_model"] == by_name["layer_identity"]["base_model"] == base
        assert by_name["layer_identity"]["parameters"]["samples"] == 2

    def test_a_failed_row_does_not_run_again(self, given, settings):
        run = Recorder(failing=(REPLAY,))
        found = measure_costs(given, settings, QUICK, run=run)
        assert run.names == ["fit", LINEAR, REPLAY, "layer_identity", LINEAR]
        replay = found.comparisons[0].rows[1]
        assert replay.reason == "Error: no luck"
        assert not replay.rounds

    def test_without_coefficients_there_is_no_replay(self, given, settings):
        run = Recorder(failing=("fit",))
        found = measure_costs(given, settings, QUICK, run=run)
        assert REPLAY not in run.names
        assert found.comparisons[0].rows[1].reason == "Error: no luck"
        assert not found.comparisons[0].rows[2].reason

    def test_finished_rows_stay_when_a_run_is_stopped(self, given, settings):
        class Stopped(Recorder):
            def __call__(self, command, log):
                if log.stem == "layer_identity":
                    raise KeyboardInterrupt
                return super().__call__(command, log)

        with pytest.raises(KeyboardInterrupt):
            measure_costs(given, settings, QUICK, run=Stopped())
        (found,) = json.loads((settings.out / "cost.json").read_text())["comparisons"]
        assert [len(row["rounds"]) for row in found["rows"]] == [1, 1, 0]

    def test_text_that_is_missing_is_named_before_any_merge(self, given, settings):
        half = replace(given, calibrations={"first": given.calibrations["first"]})
        with pytest.raises(DamError, match=r"replay, layer_identity cannot run .* of second: pass"):
            measure_costs(half, settings, QUICK, run=never)
        run = Recorder()
        measure_costs(half, settings, Choices(only=(LINEAR,)), run=run)
        assert run.names == [LINEAR] * 2

    def test_a_sweep_measures_every_value(self, settings):
        run = Recorder()
        sweeps = [Sweep("layers", (1, 2)), Sweep("samples", (3,))]
        one = replace(settings, rounds=1, out_shard_size="1M")
        found = measure_costs(TINY_SHAPE, one, Choices(only=("layer_identity",)), sweeps, run=run)
        cases = [dict(comparison.case) for comparison in found.comparisons]
        assert cases == [{"layers": 1}, {"layers": 2}, {"samples": 3}]
        samples = [own["parameters"].get("samples") for own in run.configurations]
        assert samples == [None, 2, None, 2, None, 3]
        assert all(command[-2:] == ["--out-shard-size", "1M"] for command in run.commands)
        assert not any(row.reason for own in found.comparisons for row in own.rows)
        if plot.available():
            assert {path.name for path in settings.out.glob("*.png")} == {
                "layers.png",
                "samples.png",
            }


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name the models with --model NAME=PATH, or pass --synthetic"),
            (["--model", "a"], "--model a: write NAME=PATH"),
            (["--model", "a=x", "--calibration", "b=y"], "b=...: no --model has that name"),
            (["--model", "a=x", "--layers", "3"], "--layers is a size of --synthetic models"),
            (["--model", "a=x", "--models", "3"], "--models is a size of --synthetic models"),
            (["--model", "a=x"], "cannot run without calibration text of a: pass --calibration"),
            (["--synthetic", "--base", "x"], "--synthetic brings its own models and texts"),
            (["--synthetic", "--hidden", "3"], "hidden 3: rotary positions need an even number"),
            (["--synthetic", "--sweep", "vocab=8"], "vocab 8: 512 is the least there can be"),
            (["--synthetic", "--sweep", "depth=8"], "write NAME=VALUE,VALUE,..."),
            (["--synthetic", "--only", "dma"], "no row is named 'dma'"),
            (["--synthetic", "--out", "a+b"], "has a + or @"),
        ],
    )
    def test_wrong_options_are_refused(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(cost.main, arguments)
        assert result.exit_code
        assert not (tmp_path / "cost").exists()
        assert message in " ".join(result.output.replace("\n", " ").split())

    @pytest.mark.slow
    def test_a_whole_run_through_mergekits_command(self, tmp_path):
        arguments = ["--synthetic", "--layers", "2", "--hidden", "16", "--intermediate", "24"]
        arguments += ["--vocab", "512", "--models", "2", "--samples", "4", "--sequence-length"]
        arguments += ["16", "--rounds", "1", "--out", str(tmp_path / "out")]
        arguments += ["--only", "replay", "--only", "bad", "--dam", "bad: sampels=3"]
        done = subprocess.run(
            [sys.executable, "-m", "examples.benchmarks.cost", *arguments],
            cwd=Path(cost.__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        rows = cells_of(done.stdout)
        assert list(rows) == [LINEAR, REPLAY, "bad"]
        assert "did you mean `samples`?" in rows["bad"]["parameters, or why it failed"]
        for name in (LINEAR, REPLAY):
            assert float(rows[name]["seconds"]) > 0
            assert float(rows[name]["GB"]) > 0.1
        if sys.platform == "linux":
            assert 0.1 < float(rows[REPLAY]["own GB"]) < float(rows[REPLAY]["GB"])
        assert done.stdout.strip() in (tmp_path / "out" / "cost.md").read_text()
