"""The benchmark of merges: whole runs, and its command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.benchmarks import quality
from examples.benchmarks.measuring.models import Models
from examples.benchmarks.measuring.processes import Measured
from examples.benchmarks.merge_quality import regmean, results
from examples.benchmarks.merge_quality.documents import Sources
from examples.benchmarks.merge_quality.methods import REGMEAN, Choices
from examples.benchmarks.merge_quality.results import LINEAR, OWN
from examples.benchmarks.merge_quality.run import compare
from examples.benchmarks.merge_quality.settings import Settings
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.evaluation import evaluate
from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.evaluation.texts import read_tokens
from tests.kit.benchmarks import cells_of, never
from tests.kit.merging import merge
from tests.kit.models import VOCAB_SIZE, save_models, tiny_llama_config
from tests.kit.texts import save_calibration

NAMES = ("first", "second")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """One text for each of `NAMES`, with words that the other hardly has."""
    folder = tmp_path_factory.mktemp("texts")
    return {
        name: str(save_calibration(folder / f"{name}.jsonl", seed=i, offset=24 * i))
        for i, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """A base and two specialists of it, each taught its own text for a second."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_models(folder, tiny_llama_config(), count=0).base
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, text in texts.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        tokens = read_tokens(
            Path(text), tokenizer, EvaluationSettings(sequence_length=16), vocab_size=VOCAB_SIZE
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return Models({name: str(folder / name) for name in NAMES}, str(base))


@pytest.fixture
def bed(trained, texts, tmp_path):
    """Models, texts and settings of a short run."""
    settings = Settings(
        out=tmp_path / "out",
        samples=4,
        sequence_length=16,
        sequences={"validation": 4, "test": 6},
    )
    return trained, {name: Sources(text=text) for name, text in texts.items()}, settings


def in_this_process(command, log):
    """Run what a command would, without starting one; of dam nothing is asked here."""
    config = Path(command[-2] if command[1].endswith("regmean.py") else command[3])
    if command[1].endswith("regmean.py"):
        regmean.run(regmean.Job(**json.loads(config.read_text())), Path(command[-1]))
    else:
        merge(yaml.safe_load(config.read_text()), Path(command[4]))
    return Measured(0, 2.0, 3_000_000)


def compare_on(bed, choices, run):
    models, sources, settings = bed
    return compare(models, sources, settings, choices, run=run)


STOCK = Choices(skip=("dam", "reference", "end_to_end"))


class TestRun:
    @pytest.mark.slow
    def test_every_stock_method_and_regmean_gets_a_row(self, bed):
        models, sources, settings = bed
        found = compare(models, sources, settings, STOCK, run=in_this_process)
        assert [row.reason for row in found.rows] == [""] * len(found.rows)
        names = [row.name for row in found.rows]
        assert names[:3] == ["base", OWN, LINEAR]
        assert {"ties", "slerp", "dare_linear", "model_stock", REGMEAN} <= set(names)
        assert all(set(row.test) == set(NAMES) for row in found.rows)
        assert json.loads((settings.out / "quality.json").read_text())["rows"] == [
            json.loads(json.dumps(row)) for row in found.to_json()["rows"]
        ]
        assert found.table() in (settings.out / "quality.md").read_text()
        shares = {row.name: results.mean(found.recovery(row)) for row in found.rows}
        assert (shares[LINEAR], shares[OWN]) == (0, 1)
        assert None not in shares.values()
        assert list((settings.out / "merged").iterdir()) == []

    def test_losses_are_those_of_evaluate_on_the_written_parts(self, bed):
        models, sources, settings = bed
        kept = Settings(**{**vars(settings), "keep": True})
        choices = Choices(only=("task_arithmetic",))
        found = compare(models, sources, kept, choices, run=in_this_process)
        row = found.rows[-1]
        assert row.chosen is not None
        assert len(row.trials) == 4
        oracle = {
            part: evaluate(
                [str(settings.out / "merged" / "task_arithmetic")],
                [settings.out / "data" / f"{name}.{part}.jsonl" for name in NAMES],
                EvaluationSettings(sequence_length=16, sequences=settings.sequences[part]),
            )
            for part in ("validation", "test")
        }
        for part, evaluation in oracle.items():
            (losses,) = evaluation.losses.values()
            assert list(getattr(row, part).values()) == pytest.approx(list(losses.values()))
        own = found.rows[1]
        for name, model in models.specialists.items():
            path = settings.out / "data" / f"{name}.test.jsonl"
            alone = evaluate([model], [path], EvaluationSettings(sequence_length=16, sequences=6))
            assert own.test[name] == pytest.approx(alone.losses[model][f"{name}.test"])

    def test_the_chosen_point_is_the_best_of_validation(self, bed):
        found = compare_on(bed, Choices(only=("ties",)), in_this_process)
        own, linear, ties = found.rows[-3:]
        shares = [
            results.mean(
                results.recovery(t.validation, linear=linear.validation, own=own.validation)
            )
            for t in ties.trials
        ]
        known = [share for share in shares if share is not None]
        assert len(set(known)) == len(shares) > 1
        assert ties.chosen is ties.trials[known.index(max(known))]

    def test_a_failed_merge_becomes_a_row(self, bed):
        def run(command, log):
            if "ties" in log.name or log.name.startswith("task_arithmetic-1"):
                log.write_text("Loading\nError: no luck\n")
                return Measured(1, 0.5, 1_000_000)
            return in_this_process(command, log)

        choices = Choices(only=("ties", "task_arithmetic", REGMEAN))
        found = compare_on(bed, choices, run)
        rows = {row.name: row for row in found.rows}
        assert rows["ties"].reason == "Error: no luck"
        assert not rows["ties"].test
        assert cells_of(found.table())["ties"]["parameters, or why it failed"] == "Error: no luck"
        assert [bool(t.reason) for t in rows["task_arithmetic"].trials] == [True] + [False] * 3
        assert rows["task_arithmetic"].test
        assert rows[REGMEAN].test

    def test_a_merge_that_leaves_no_model_becomes_a_row(self, bed):
        def run(command, log):
            if "ties" in log.name:
                Path(command[4]).mkdir()
                return Measured(0, 0.5, 1_000_000)
            return in_this_process(command, log)

        row = compare_on(bed, Choices(only=("ties",)), run).rows[-1]
        assert row.reason.startswith("DamError: the model ")

    def test_finished_rows_stay_when_a_run_is_stopped(self, bed):
        def run(command, log):
            if "ties" in log.name:
                raise KeyboardInterrupt
            return in_this_process(command, log)

        settings = bed[2]
        with pytest.raises(KeyboardInterrupt):
            compare_on(bed, Choices(only=("ties", REGMEAN)), run)
        rows = json.loads((settings.out / "quality.json").read_text())["rows"]
        assert [row["name"] for row in rows] == ["base", OWN, LINEAR]
        assert LINEAR in (settings.out / "quality.md").read_text()

    def test_too_little_calibration_text_is_refused_before_any_merge(self, bed):
        models, sources, settings = bed
        greedy = Settings(**{**vars(settings), "samples": 10_000})
        with pytest.raises(DamError, match=r"10000 sequences of 16 tokens .* are needed"):
            compare(models, sources, greedy, STOCK, run=never)


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name the specialists with --model NAME=PATH"),
            (["--model", "a"], "--model a: write NAME=PATH"),
            (["--model", "a=x", "--model", "a=y"], "each name once"),
            (["--model", "a=x", "--test", "b=y"], "--test b=...: no --model has that name"),
            (["--demo", "--model", "a=x"], "--demo brings its own models and texts"),
            (["--model", "a=x", "--dam", "new"], "write 'name: key=value, key=value'"),
            (["--model", "a=x", "--out", "a+b"], "has a + or @"),
        ],
    )
    def test_wrong_options_are_refused(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(quality.main, arguments)
        assert result.exit_code
        assert not (tmp_path / "quality").exists()
        assert message in " ".join(result.output.replace("\n", " ").split())

    @pytest.mark.slow
    def test_a_whole_run_through_mergekits_command(self, trained, texts, tmp_path):
        arguments = ["--base", trained.base]
        for name, model in trained.specialists.items():
            arguments += ["--model", f"{name}={model}", "--text", f"{name}={texts[name]}"]
        arguments += ["--samples", "4", "--sequence-length", "16", "--out", str(tmp_path / "out")]
        arguments += ["--only", "dam", "--only", "regmean", "--only", "bad"]
        arguments += ["--dam", "bad: sampels=3"]
        done = subprocess.run(
            [sys.executable, "-m", "examples.benchmarks.quality", *arguments],
            cwd=Path(quality.__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        rows = cells_of(done.stdout)
        assert list(rows) == ["base", OWN, LINEAR, REGMEAN, "dam", "bad"]
        assert "did you mean `samples`?" in rows["bad"]["parameters, or why it failed"]
        assert rows[LINEAR]["recovery"] == "0.000"
        assert rows[OWN]["recovery"] == "1.000"
        for name in (LINEAR, REGMEAN, "dam"):
            assert float(rows[name]["seconds"]) > 0
            assert float(rows[name]["GB"]) > 0.1
        found = json.loads((tmp_path / "out" / "quality.json").read_text())
        assert {row["name"]: row["test"] for row in found["rows"]}["dam"].keys() == set(NAMES)
        assert done.stdout.strip() in (tmp_path / "out" / "quality.md").read_text()
