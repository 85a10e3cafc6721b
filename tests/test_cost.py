"""The benchmark of costs: its sizes, its models, its numbers, and whole runs on tiny models."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.benchmarks import cost
from examples.benchmarks.measuring.models import Models
from examples.benchmarks.measuring.processes import Measured
from examples.benchmarks.merge_cost import page_cache, plot, synthetic
from examples.benchmarks.merge_cost.results import LINEAR, Comparison, Report, Row
from examples.benchmarks.merge_cost.rows import REPLAY, Choices, select
from examples.benchmarks.merge_cost.run import measure_costs
from examples.benchmarks.merge_cost.settings import (
    Given,
    Settings,
    Shape,
    Sweep,
    every_case,
    parse_sweep,
)
from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.errors import DamError
from tests.merging import merge
from tests.test_quality import cells_of

TINY = Shape(layers=2, hidden=16, intermediate=24, vocab=512, models=2, dtype="float32")


class TestSizes:
    def test_a_sweep_is_read(self):
        assert parse_sweep("layers=12,24, 48,24") == Sweep("layers", (12, 24, 48))
        assert parse_sweep("sequence-length=64") == Sweep("sequence_length", (64,))

    @pytest.mark.parametrize("text", ["layers", "layers=", "layers=1,,2", "depth=1", "layers=-1"])
    def test_a_sweep_written_otherwise_is_refused(self, text):
        with pytest.raises(DamError, match="write NAME=VALUE,VALUE,"):
            parse_sweep(text)

    def test_a_sweep_changes_one_size_and_leaves_the_others(self, tmp_path):
        settings = Settings(out=tmp_path)
        sweeps = [Sweep("layers", (1, 3)), Sweep("samples", (5,))]
        assert every_case(TINY, settings, sweeps) == [
            ({"layers": 1}, replace(TINY, layers=1), settings),
            ({"layers": 3}, replace(TINY, layers=3), settings),
            ({"samples": 5}, TINY, replace(settings, samples=5)),
        ]
        assert every_case(TINY, settings, []) == [({}, TINY, settings)]

    def test_models_that_are_given_keep_their_shape(self, tmp_path):
        given = Given(Models({"a": "/a"}), {})
        settings = Settings(out=tmp_path)
        with pytest.raises(DamError, match="pass --synthetic, or sweep samples or sequence_length"):
            every_case(given, settings, [Sweep("layers", (1,))])
        ((case, source, _),) = every_case(given, settings, [Sweep("samples", (2,))])
        assert (case, source) == ({"samples": 2}, given)

    @pytest.mark.parametrize("sizes", [{"layers": 0}, {"hidden": 33}, {"vocab": 100}])
    def test_a_shape_that_cannot_be_is_refused(self, sizes):
        with pytest.raises(DamError, match=next(iter(sizes))):
            replace(TINY, **sizes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synthetic.make(TINY, tmp_path_factory.mktemp("made") / "models", tokens=300)


class TestSynthetic:
    def test_models_are_whole_and_near_to_each_other(self, made):
        states = []
        for path in made.models.specialists.values():
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            model, info = loaded
            assert not any(info.values()), info
            assert model.config.num_hidden_layers == TINY.layers
            assert model.lm_head.weight.shape == (TINY.vocab, TINY.hidden)
            states.append(model.state_dict())
        for name, one in states[0].items():
            other = states[1][name]
            assert 0.02 < (one - other).norm() / one.norm() < 0.2, name

    def test_text_is_enough_and_every_models_own(self, made):
        tokens = []
        for name, path in made.models.specialists.items():
            found = load_calibration(
                made.calibrations[name],
                model=name,
                tokenizer=AutoTokenizer.from_pretrained(path),
                samples=10,
                sequence_length=30,
                vocab_size=TINY.vocab,
                seed=0,
            )
            tokens.append(found.tokens)
        assert not torch.equal(*tokens)

    def test_a_file_holds_one_layer_however_many_there_are(self, tmp_path):
        for layers in (1, 4):
            folder = tmp_path / str(layers)
            given = synthetic.make(replace(TINY, layers=layers), folder, tokens=1)
            sizes = [
                {file.stat().st_size for file in Path(path).glob("*.safetensors")}
                for path in given.models.specialists.values()
            ]
            assert len(list((folder / "model_0").glob("*.safetensors"))) == layers + 2
            assert max(map(max, sizes)) < 4 * 1.1 * TINY.vocab * TINY.hidden

    def test_models_of_the_shape_are_kept_and_others_replaced(self, tmp_path):
        def written(shape, tokens):
            given = synthetic.make(shape, tmp_path, tokens=tokens)
            file = Path(given.models.any, "model.safetensors.index.json")
            return file.stat().st_mtime_ns, Path(given.calibrations["model_0"]).stat().st_size

        first = written(TINY, 10)
        again = written(TINY, 50_000)
        assert again[0] == first[0] and again[1] > first[1]
        assert written(replace(TINY, models=1), 10)[0] != first[0]
        assert [path.name for path in sorted(tmp_path.glob("model_?"))] == ["model_0"]

    def test_half_made_models_are_made_anew(self, tmp_path):
        given = synthetic.make(TINY, tmp_path, tokens=1)
        whole = {file.name: file.read_bytes() for file in Path(given.models.any).iterdir()}
        (tmp_path / "shape.json").unlink()
        (Path(given.models.any) / "config.json").unlink()
        synthetic.make(TINY, tmp_path, tokens=1)
        assert whole == {file.name: file.read_bytes() for file in Path(given.models.any).iterdir()}


def test_files_dropped_from_the_page_cache_are_as_before(tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux drops files")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"weights")
    page_cache.drop([str(tmp_path / "model"), "org/model"])
    assert (tmp_path / "model" / "weights").read_bytes() == b"weights"


class TestRows:
    def test_linear_comes_first_and_always(self, tmp_path):
        def names(**choices):
            return [row.name for row in select(Choices(**choices), coefficients=tmp_path / "c")]

        every = [LINEAR, REPLAY, "layer_identity", "layer_sensitivity", "dam"]
        assert names() == every
        assert names(only=("layer*",), skip=("*sens*", LINEAR)) == [LINEAR, "layer_identity"]
        assert names(variants={"mine": {"ridge": 1}}) == [*every, "mine"]
        with pytest.raises(DamError, match="a row named dam is there already"):
            names(variants={"dam": {}})

    def test_rows_that_fit_are_told_from_those_that_do_not(self, tmp_path):
        merges = select(Choices(), coefficients=tmp_path / "file")
        assert [merge.name for merge in merges if not merge.point.fits] == [LINEAR, REPLAY]
        assert merges[1].point.parameters == {"coefficients": str(tmp_path / "file")}
        assert merges[1].shown == {"coefficients": "file"}


def row(name, seconds, peaks, own=None, **given):
    rounds = [
        Measured(0, second, peak, own_peak_bytes=own)
        for second, peak in zip(seconds, peaks, strict=True)
    ]
    return Row(name=name, parameters={}, rounds=tuple(rounds), **given)


class TestResults:
    def test_ratios_are_those_of_a_round(self):
        """The machine was three times slower in the second round: that is nobody's ratio."""
        linear = row(LINEAR, [1.0, 3.0, 1.0], [100] * 3)
        fit = row("fit", [2.0, 6.0], [150, 250])
        assert fit.ratio("seconds", linear) == 2.0
        assert fit.of("seconds") == 4.0
        assert fit.ratio("peak_bytes", linear) == 2.0
        assert linear.ratio("seconds", linear) == 1.0

    def test_what_is_not_known_is_left_out(self):
        linear = row(LINEAR, [1.0], [100])
        failed = Row(name="fit", parameters={"ridge": 1.0}, reason="no luck")
        assert failed.of("seconds") is failed.ratio("seconds", linear) is None
        assert linear.of("own_peak_bytes") is None
        assert linear.ratio("seconds", failed) is None
        cells = cells_of(Comparison(case={}, rows=(linear, failed)).table())
        assert cells[LINEAR]["seconds"] == "1.0" and cells[LINEAR]["own GB"] == ""
        assert cells["fit"]["seconds"] == cells["fit"]["rounds"] == ""
        assert cells["fit"]["parameters, or why it failed"] == "no luck"

    def test_the_table_holds_the_numbers(self):
        measured = Measured(
            0, 12.345, 1_234_567_890, own_peak_bytes=10**9, read_bytes=5_000_000, disk_bytes=0
        )
        fit = Row(name="fit", parameters={"ridge": 0.1}, rounds=(measured,))
        linear = row(LINEAR, [10.0, 10.0], [10**9] * 2)
        assert cells_of(Comparison(case={}, rows=(linear, fit)).table())["fit"] == {
            "merge": "fit",
            "seconds": "12.3",
            "time ratio": "1.23",
            "GB": "1.23",
            "memory ratio": "1.23",
            "own GB": "1.00",
            "read GB": "0.005",
            "disk GB": "0.000",
            "written GB": "",
            "rounds": "1",
            "parameters, or why it failed": "ridge=0.1",
        }

    def test_a_page_holds_every_table_and_json_every_round(self):
        found = swept()
        page = found.markdown(["layers.png"])
        for comparison in found.comparisons:
            assert comparison.table() in page
        assert found.tables() in page and "![layers.png](layers.png)" in page
        data = json.loads(json.dumps(found.to_json()))
        assert [own["case"] for own in data["comparisons"]] == [
            {"layers": 2},
            {"layers": 4},
            {"samples": 8},
        ]
        fit = data["comparisons"][0]["rows"][1]
        assert [own["seconds"] for own in fit["rounds"]] == [2.0]
        assert (fit["time_ratio"], fit["peak_bytes"]) == (2.0, 200_000_000)

    def test_a_sweep_gives_memory_by_value(self):
        layers, samples = swept().curves()
        assert (layers.name, layers.values) == ("layers", (2, 4))
        assert layers.peaks == {
            "Peak GB": {LINEAR: (1e8, 1e8), "fit": (2e8, None)},
            "Own GB": {LINEAR: (5e7, 5e7), "fit": (6e7, None)},
        }
        assert samples.values == (8,)
        table = next(iter(layers.tables())).partition("\n\n")[2]
        assert cells_of(table) == {
            "2": {"layers": "2", LINEAR: "0.100", "fit": "0.200"},
            "4": {"layers": "4", LINEAR: "0.100", "fit": ""},
        }

    def test_a_sweep_is_drawn(self, tmp_path):
        pytest.importorskip("matplotlib")
        assert plot.available()
        plot.draw(next(iter(swept().curves())), tmp_path / "layers.png")
        assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def swept():
    linear = row(LINEAR, [1.0, 1.0], [10**8] * 2, own=5 * 10**7)
    fit = row("fit", [2.0], [2 * 10**8], own=6 * 10**7)
    failed = Row(name="fit", parameters={}, reason="no luck")
    return Report(
        comparisons=(
            Comparison(case={"layers": 2}, rows=(linear, fit)),
            Comparison(case={"layers": 4}, rows=(linear, failed)),
            Comparison(case={"samples": 8}, rows=(linear, fit)),
        ),
        settings={"dtype": "float32"},
    )


@pytest.fixture
def settings(tmp_path):
    return Settings(out=tmp_path / "out", samples=2, sequence_length=16, rounds=2, dtype="float32")


@pytest.fixture
def given(llama_models, calibration):
    names = ("first", "second")
    models = Models(dict(zip(names, map(str, llama_models.models), strict=True)))
    return Given(models, dict(zip(names, map(str, calibration), strict=True)))


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
        assert replay.reason == "Error: no luck" and not replay.rounds

    def test_without_coefficients_there_is_no_replay(self, given, settings):
        run = Recorder(failing=("fit",))
        found = measure_costs(given, settings, QUICK, run=run)
        assert REPLAY not in run.names
        assert found.comparisons[0].rows[1].reason == "Error: no luck"
        assert not found.comparisons[0].rows[2].reason

    def test_what_is_finished_stays_when_a_run_is_stopped(self, given, settings):
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
        found = measure_costs(TINY, one, Choices(only=("layer_identity",)), sweeps, run=run)
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


def never(command, log):
    raise AssertionError("a merge was started")


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
    def test_what_is_written_wrongly_is_refused(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(cost.main, arguments)
        assert result.exit_code and not (tmp_path / "cost").exists()
        assert message in " ".join(result.output.replace("\n", " ").split())

    @pytest.mark.slow
    def test_a_whole_run_through_mergekits_command(self, tmp_path):
        arguments = ["--synthetic", "--layers", "2", "--hidden", "16", "--intermediate", "24"]
        arguments += ["--vocab", "512", "--models", "2", "--samples", "4", "--sequence-length"]
        arguments += ["16", "--rounds", "1", "--out", str(tmp_path / "out")]
        arguments += ["--only", "replay", "--only", "bad", "--dam", "bad: sampels=3"]
        done = subprocess.run(
            [sys.executable, str(Path(cost.__file__)), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        rows = cells_of(done.stdout)
        assert list(rows) == [LINEAR, REPLAY, "bad"]
        assert "did you mean `samples`?" in rows["bad"]["parameters, or why it failed"]
        for name in (LINEAR, REPLAY):
            assert float(rows[name]["seconds"]) > 0 and float(rows[name]["GB"]) > 0.1
        if sys.platform == "linux":
            assert 0.1 < float(rows[REPLAY]["own GB"]) < float(rows[REPLAY]["GB"])
        assert done.stdout.strip() in (tmp_path / "out" / "cost.md").read_text()
