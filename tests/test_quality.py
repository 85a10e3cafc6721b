"""The benchmark of merges: its split, its numbers, its table, and whole runs on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from examples.benchmarks import quality
from examples.benchmarks.measuring.merges import Point, configuration
from examples.benchmarks.measuring.models import Models
from examples.benchmarks.measuring.processes import Measured
from examples.benchmarks.merge_quality import documents, regmean, results
from examples.benchmarks.merge_quality.documents import PARTS, Shares, Sources
from examples.benchmarks.merge_quality.methods import REGMEAN, Choices, select
from examples.benchmarks.merge_quality.results import LINEAR, OWN, Report, Row, Trial, best
from examples.benchmarks.merge_quality.run import Settings, compare
from mergekit_dam.errors import DamError
from mergekit_dam.evaluate import EvaluationSettings, evaluate, read_tokens
from tests.merging import merge
from tests.models import (
    ARCHITECTURES,
    VOCAB_SIZE,
    fine_tune,
    make_model,
    save_calibration,
    save_models,
    tiny_llama_config,
)

LONG = "a text of more than forty characters, so that it counts wherever it stands"


def save_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


class TestSplit:
    def test_parts_are_disjoint_and_hold_everything(self):
        texts = [f"document {i}" for i in range(100)]
        parts = documents.split(texts, Shares().of(PARTS))
        assert [len(part) for part in parts] == [50, 20, 30]
        assert sorted(text for part in parts for text in part) == sorted(texts)

    def test_follows_from_the_texts_and_not_from_their_order(self):
        texts = [f"document {i}" for i in range(20)]
        assert documents.split(texts, [0.5, 0.5]) == documents.split(texts[::-1], [0.5, 0.5])

    @pytest.mark.parametrize("shares", [(0.98, 0.01, 0.01), (0.01, 0.01, 0.98)])
    def test_gives_every_part_a_document(self, shares):
        assert [len(part) for part in documents.split(["a", "b", "c"], shares)] == [1, 1, 1]

    def test_refuses_fewer_documents_than_parts(self):
        with pytest.raises(DamError, match="2 documents cannot be split into 3 parts"):
            documents.split(["a", "b"], [0.4, 0.3, 0.3])

    def test_shares_are_relative_to_the_parts_that_a_file_serves_for(self):
        shares = Shares(calibration=0.5, validation=0.2, test=0.3)
        assert shares.of(("calibration", "validation")) == pytest.approx([5 / 7, 2 / 7])
        assert shares.of(("test",)) == [1.0]


class TestOverlap:
    def test_finds_what_is_equal_but_for_white_space(self):
        assert documents.overlap(["a  b\nc"], ["a b c", "a b"]) == ["a b c"]

    def test_finds_a_text_inside_another_either_way(self):
        assert documents.overlap([LONG], [f"before {LONG} after", "x"]) == [f"before {LONG} after"]
        assert documents.overlap([f"before {LONG} after"], [LONG, "x"]) == [LONG]

    def test_takes_no_short_text_for_a_part_of_another(self):
        assert documents.overlap(["Yes"], [f"Yes, {LONG}"]) == []
        assert documents.overlap([f"Yes, {LONG}"], ["Yes"]) == []

    def test_finds_nothing_across_two_documents(self):
        assert documents.overlap(["one " * 8, "two " * 8], ["one " * 8 + "two " * 8]) == []


class TestParts:
    def test_test_text_is_never_calibration_text(self, tmp_path):
        """Files of their own that share documents, within a domain and across."""
        mixed = [f"{LONG} {i}." for i in range(40)]
        sources = {
            "a": Sources(
                calibration=save_texts(tmp_path / "a.jsonl", mixed[:30]),
                test=save_texts(tmp_path / "at.jsonl", mixed[25:35]),
            ),
            "b": Sources(
                calibration=save_texts(tmp_path / "b.jsonl", [*mixed[30:33], *mixed[36:]]),
                validation=save_texts(tmp_path / "bv.jsonl", ["v", mixed[36]]),
                test=save_texts(tmp_path / "bt.jsonl", ["w", mixed[0]]),
            ),
        }
        parts, left_out = documents.make_parts(sources, Shares())
        held = {part: {text for own in parts.values() for text in own[part]} for part in PARTS}
        assert held["test"] == {*mixed[25:35], mixed[0], "w"}
        assert not held["calibration"] & (held["test"] | held["validation"])
        assert not held["validation"] & held["test"]
        gone = {text for texts in left_out.values() for text in texts}
        assert gone == {mixed[0], *mixed[25:33], mixed[36]}

    def test_one_file_serves_for_all_parts(self, tmp_path):
        file = save_texts(tmp_path / "a.jsonl", ["twice", *(f"text {i}" for i in range(9))] * 2)
        parts, _ = documents.make_parts({"a": Sources(text=file)}, Shares())
        assert {part: len(texts) for part, texts in parts["a"].items()} == {
            "calibration": 5,
            "validation": 2,
            "test": 3,
        }
        assert len({text for texts in parts["a"].values() for text in texts}) == 10

    def test_parts_are_written_and_counted(self, tmp_path):
        file = save_texts(tmp_path / "a.jsonl", [f"text {i}" for i in range(10)])
        parts, left_out = documents.make_parts({"a": Sources(text=file)}, Shares())
        documents.write_parts(parts, tmp_path / "data")
        for part in PARTS:
            path = documents.part_path(tmp_path / "data", "a", part)
            assert documents.read_documents(str(path)) == list(parts["a"][part])
        summaries = documents.summarise(parts, left_out, lambda text: len(text.split()))
        assert documents.statement(summaries)[0] == (
            "a: calibration 5 documents (10 tokens), validation 2 documents (4 tokens), "
            "test 3 documents (6 tokens)"
        )

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"text": "alone"}], "a: .* 1 documents cannot be split into 3 parts"),
            ([{"messages": [{"role": "user", "content": "x"}]}], "holds chat messages"),
            ([{"input_ids": [1, 2]}], "holds token ids"),
        ],
    )
    def test_what_cannot_be_split_is_refused(self, rows, message, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DamError, match=message):
            documents.make_parts({"a": Sources(text=str(file))}, Shares())

    def test_a_missing_text_is_named(self, tmp_path):
        file = save_texts(tmp_path / "a.jsonl", ["x", "y"])
        with pytest.raises(DamError, match="a has no test text: pass --text, or --test, a=FILE"):
            documents.make_parts({"a": Sources(calibration=file)}, Shares())


class TestRecovery:
    def test_is_the_share_of_the_advantage_won_back(self):
        linear, own = {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 1.5}
        found = results.recovery({"a": 2.25, "b": 2.1}, linear=linear, own=own)
        assert found == pytest.approx({"a": 0.75, "b": -0.2})
        assert results.mean(found) == pytest.approx(0.275)
        assert results.mean(results.recovery(linear, linear=linear, own=own)) == 0
        assert results.mean(results.recovery(own, linear=linear, own=own)) == 1

    def test_leaves_out_a_domain_without_an_advantage(self):
        found = results.recovery(
            {"a": 2.5, "b": 1.0}, linear={"a": 3.0, "b": 2.0}, own={"a": 2.0, "b": 2.0}
        )
        assert found == {"a": 0.5, "b": None}
        assert results.mean(found) == 0.5
        assert results.mean({"a": None}) is None

    def test_the_best_point_is_that_of_most_recovery(self):
        """Not of least mean loss, which the domain of the widest losses would decide."""
        linear, own = {"a": 10.0, "b": 1.0}, {"a": 5.0, "b": 0.9}
        near_a = Trial(parameters={}, validation={"a": 9.0, "b": 1.0})
        near_b = Trial(parameters={}, validation={"a": 10.0, "b": 0.91})
        broken = Trial(parameters={}, reason="broken")
        assert best([broken, near_a, near_b], linear=linear, own=own) is near_b
        assert best([near_a, near_b], linear={}, own=own) is near_a
        assert best([broken], linear=linear, own=own) is None


def report():
    chosen = Trial(
        parameters={"weight": 0.4, "normalize": False},
        seconds=12.345,
        peak_bytes=1_234_567_890,
        validation={"a": 2.5, "b": 1.75},
    )
    return Report(
        domains=("a", "b"),
        rows=(
            Row(name=OWN, test={"a": 2.0, "b": 1.5}, validation={"a": 2.0, "b": 1.5}),
            Row(name=LINEAR, test={"a": 3.0, "b": 2.0}, validation={"a": 3.0, "b": 2.0}),
            Row(
                name="ties",
                test={"a": 2.2504, "b": 2.1},
                validation=chosen.validation,
                trials=(chosen, Trial(parameters={}, reason="no")),
                chosen=chosen,
            ),
            Row(name="broken", reason="one | two\nthree"),
        ),
        texts=("a: 3 documents",),
        settings={"dtype": "float32"},
    )


def cells_of(table):
    """The table's rows by name, as what stands in each column."""
    header, _, *lines = [
        [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        for line in table.splitlines()
    ]
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in lines}


class TestReport:
    def test_the_table_holds_the_numbers(self):
        rows = cells_of(report().table())
        assert rows["ties"] == {
            "nats per token": "ties",
            "a": "2.250",
            "b": "2.100",
            "recovery": "0.275",
            "by domain": "0.75 -0.20",
            "validation": "0.500",
            "seconds": "12.3",
            "GB": "1.23",
            "of": "2",
            "parameters, or why it failed": "weight=0.4, normalize=false",
        }
        assert rows[LINEAR]["recovery"] == "0.000"
        assert rows["broken"]["parameters, or why it failed"] == "one / two three"
        assert rows["broken"]["recovery"] == rows["broken"]["a"] == ""

    def test_its_numbers_are_those_of_the_json(self):
        found = json.loads(json.dumps(report().to_json()))
        table = cells_of(report().table())
        assert [row["name"] for row in found["rows"]] == list(table)
        for row in found["rows"]:
            cells = table[row["name"]]
            for domain, loss in row["test"].items():
                assert float(cells[domain]) == pytest.approx(loss, abs=5e-4)
            if row["recovery"] is not None:
                assert float(cells["recovery"]) == pytest.approx(row["recovery"], abs=5e-4)
            if row["chosen"] is not None:
                assert float(cells["seconds"]) == pytest.approx(row["chosen"]["seconds"], abs=0.05)

    def test_the_page_defines_what_it_shows(self):
        page = report().markdown()
        assert report().table() in page
        assert "(CE_linear - CE_merged) / (CE_linear - CE_own_specialist)" in page
        assert "a: 3 documents" in page


class TestMethods:
    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("has_base", [True, False])
    def test_every_parameter_of_a_grid_is_known_to_mergekit(self, count, has_base):
        """It ignores what it does not know: a typo would be a grid of equal merges."""
        models = {f"m{i}": f"/models/{i}" for i in range(count)}
        for method in select(Choices(), count=count, has_base=has_base, samples=4):
            for point in method.points:
                if point.method in (REGMEAN, "dam"):
                    continue
                spec = merge_methods.get(point.method).spec
                own = {"weight"} if point.weights else set()
                assert {*point.parameters, *own} <= {p.name for p in spec.parameters}
                config = MergeConfiguration.model_validate(
                    yaml.safe_load(yaml_of(point, models, base="/base" if has_base else None))
                )
                assert [str(entry.model) for entry in config.models or []] == [*models.values()]

    def test_points_of_a_grid_differ(self):
        for method in select(Choices(), count=3, has_base=True, samples=4):
            shown = [json.dumps(point.shown) for point in method.points]
            assert len(set(shown)) == len(shown) > 0

    def test_methods_follow_from_what_is_merged(self):
        def names(**of):
            return {method.name for method in select(Choices(), samples=4, **of)}

        assert {"slerp", "nuslerp"} <= names(count=2, has_base=True)
        assert not {"slerp", "nuslerp"} & names(count=3, has_base=True)
        without_base = names(count=3, has_base=False)
        assert {LINEAR, "karcher", REGMEAN, "reference", "dam"} <= without_base
        assert not {"ties", "task_arithmetic", "model_stock"} & without_base

    def test_rows_are_chosen_by_name_but_linear_always_runs(self):
        def names(**choices):
            found = select(Choices(**choices), count=3, has_base=True, samples=4)
            return [method.name for method in found]

        assert names(only=("dam",)) == [LINEAR, "dam"]
        assert names(only=("dare*", "ties"), skip=("*_ties",)) == [LINEAR, "ties", "dare_linear"]
        assert LINEAR in names(skip=("linear",))
        with pytest.raises(DamError, match="no row is named 'tise'; there are linear"):
            names(only=("tise",))

    def test_a_name_is_taken_once(self):
        with pytest.raises(DamError, match="a row named dam is there already"):
            select(Choices(variants={"dam": {}}), count=3, has_base=True, samples=4)

    def test_the_reference_sees_each_sample_once_unless_told(self):
        def steps(choices):
            (found,) = (
                m
                for m in select(choices, count=3, has_base=True, samples=7)
                if m.name == "reference"
            )
            return found.points[0].parameters["steps"]

        assert steps(Choices()) == 7
        assert steps(Choices(reference_steps=90)) == 90

    def test_dam_gets_its_texts_and_others_their_weights(self):
        models = {"a": "/a", "b": "/b"}
        dam = yaml.safe_load(yaml_of(Point(method="dam", parameters={"ridge": 0.1}), models))
        assert dam["parameters"] == {"samples": 4, "sequence_length": 16, "ridge": 0.1}
        assert dam["models"][1] == {"model": "/b", "parameters": {"calibration": "b.jsonl"}}
        weighted = Point(method="linear", weights=(2.0, 1.0), base="none")
        linear = yaml.safe_load(yaml_of(weighted, models))
        assert linear["models"][0] == {"model": "/a", "parameters": {"weight": 2.0}}
        assert "base_model" not in linear
        assert weighted.shown == {"weight": "2:1"}


def yaml_of(point, models, base="/base"):
    return configuration(
        point,
        models,
        base=base,
        calibrations={name: f"{name}.jsonl" for name in models},
        samples=4,
        sequence_length=16,
        dtype="float32",
    )


class TestRegMean:
    def test_one_layer_is_the_least_squares_fit_of_all_outputs(self):
        torch.manual_seed(0)
        inputs = [torch.randn(40, 6, dtype=torch.float64) for _ in range(3)]
        weights = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
        outputs = [x @ weight.mT for x, weight in zip(inputs, weights, strict=True)]
        oracle = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.mT
        found = regmean.merged_weight(weights, [x.mT @ x for x in inputs], alpha=1.0)
        torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-4)

    def test_off_diagonals_are_scaled(self):
        """At 0 each column is averaged on its own, by the energy of its input."""
        torch.manual_seed(0)
        grams = [x.mT @ x for x in torch.randn(2, 40, 6, dtype=torch.float64)]
        weights = list(torch.randn(2, 5, 6, dtype=torch.float64))
        energy = torch.stack([gram.diagonal() for gram in grams])
        oracle = (energy[:, None] * torch.stack(weights)).sum(0) / energy.sum(0)
        found = regmean.merged_weight(weights, grams, alpha=0.0)
        torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(regmean.merged_weight(weights, grams, 0.5), oracle, atol=1e-2)

    def test_inputs_that_are_always_0_are_averaged(self):
        grams = [torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([3.0, 0.0]))]
        weights = [torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0, 4.0]])]
        found = regmean.merged_weight(weights, grams, alpha=0.9)
        torch.testing.assert_close(found, torch.tensor([[3.0, 3.0]]).double(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
    def test_a_single_model_stays_as_it_is(self, name):
        model = make_model(ARCHITECTURES[name]())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        regmean.merge([model], [torch.randint(VOCAB_SIZE, (5, 16))], 0.9)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key])

    @pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
    def test_a_model_equals_a_dense_solve_of_every_linear(self, name):
        models = [make_model(ARCHITECTURES[name]()) for _ in range(2)]
        for seed, model in enumerate(models):
            fine_tune(model, seed=seed, scale=0.3)
        tokens = [torch.randint(VOCAB_SIZE, (6, 16)) for _ in range(2)]
        inputs = [recorded_inputs(*each) for each in zip(models, tokens, strict=True)]
        before = [{k: v.clone() for k, v in m.named_parameters()} for m in models]
        layers = {
            n for n, m in models[0].named_modules() if isinstance(m, torch.nn.Linear | Conv1D)
        }
        tied = name != "llama"
        layers -= {"lm_head"} if tied else set()
        assert inputs[0].keys() >= layers and len(layers) >= 8

        regmean.merge(models, tokens, 1.0)

        for key, merged in models[0].named_parameters():
            layer = key.removesuffix(".weight")
            own = [parameters[key].double() for parameters in before]
            if layer in layers:
                transposed = isinstance(models[0].get_submodule(layer), Conv1D)
                columns = own if transposed else [weight.mT for weight in own]
                x = [recorded[layer].double() for recorded in inputs]
                y = [a @ b for a, b in zip(x, columns, strict=True)]
                # gelsd copes with inputs that depend on each other
                oracle = torch.linalg.lstsq(torch.cat(x), torch.cat(y), driver="gelsd").solution
                x_all = torch.cat(x)
                found = (merged if transposed else merged.mT).double()
                torch.testing.assert_close(x_all @ found, x_all @ oracle, rtol=1e-3, atol=1e-3)
                average = torch.stack(columns).mean(0)
                assert not torch.allclose(x_all @ found, x_all @ average, atol=1e-2)
            else:
                torch.testing.assert_close(merged.double(), torch.stack(own).mean(0))


def recorded_inputs(model, tokens):
    """What every linear layer was fed, [tokens, in_features]."""
    found = {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: inputs[0].flatten(0, 1)})
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return found


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
        assert (shares[LINEAR], shares[OWN]) == (0, 1) and None not in shares.values()
        assert list((settings.out / "merged").iterdir()) == []

    def test_losses_are_those_of_evaluate_on_the_written_parts(self, bed):
        models, sources, settings = bed
        kept = Settings(**{**vars(settings), "keep": True})
        choices = Choices(only=("task_arithmetic",))
        found = compare(models, sources, kept, choices, run=in_this_process)
        row = found.rows[-1]
        assert row.chosen is not None and len(row.trials) == 4
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
        assert rows["ties"].reason == "Error: no luck" and not rows["ties"].test
        assert cells_of(found.table())["ties"]["parameters, or why it failed"] == "Error: no luck"
        assert [bool(t.reason) for t in rows["task_arithmetic"].trials] == [True] + [False] * 3
        assert rows["task_arithmetic"].test and rows[REGMEAN].test

    def test_a_merge_that_leaves_no_model_becomes_a_row(self, bed):
        def run(command, log):
            if "ties" in log.name:
                Path(command[4]).mkdir()
                return Measured(0, 0.5, 1_000_000)
            return in_this_process(command, log)

        row = compare_on(bed, Choices(only=("ties",)), run).rows[-1]
        assert row.reason.startswith("DamError: the model ")

    def test_what_is_finished_stays_when_a_run_is_stopped(self, bed):
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


def never(command, log):
    raise AssertionError("a merge was started")


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
    def test_what_is_written_wrongly_is_refused(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(quality.main, arguments)
        assert result.exit_code and not (tmp_path / "quality").exists()
        assert message in " ".join(result.output.replace("\n", " ").split())

    @pytest.mark.slow
    def test_a_whole_run_through_mergekits_command(self, trained, texts, tmp_path):
        arguments = ["--base", trained.base]
        for name, model in trained.specialists.items():
            arguments += ["--model", f"{name}={model}", "--text", f"{name}={texts[name]}"]
        arguments += ["--samples", "4", "--sequence-length", "16", "--out", str(tmp_path / "out")]
        arguments += ["--only", "dam", "--only", "regmean", "--only", "bad"]
        arguments += ["--dam", "bad: sampels=3"]
        script = str(Path(quality.__file__))
        done = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        rows = cells_of(done.stdout)
        assert list(rows) == ["base", OWN, LINEAR, REGMEAN, "dam", "bad"]
        assert "did you mean `samples`?" in rows["bad"]["parameters, or why it failed"]
        assert rows[LINEAR]["recovery"] == "0.000" and rows[OWN]["recovery"] == "1.000"
        for name in (LINEAR, REGMEAN, "dam"):
            assert float(rows[name]["seconds"]) > 0 and float(rows[name]["GB"]) > 0.1
        found = json.loads((tmp_path / "out" / "quality.json").read_text())
        assert {row["name"]: row["test"] for row in found["rows"]}["dam"].keys() == set(NAMES)
        assert done.stdout.strip() in (tmp_path / "out" / "quality.md").read_text()
