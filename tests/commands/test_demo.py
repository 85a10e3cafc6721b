"""The demo: its text, its training and, slow, a very small run from nothing to the table."""

import json
import os
import random
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from transformers import AutoTokenizer

from mergekit_dam.cli import main
from mergekit_dam.demo import texts
from mergekit_dam.demo.arithmetic import word_problem
from mergekit_dam.demo.muon import orthogonalised
from mergekit_dam.demo.recipes import METHODS, recipe
from mergekit_dam.demo.records import person_record
from mergekit_dam.demo.result import DemoResult
from mergekit_dam.demo.run import MARKER, run_demo, train_specialists
from mergekit_dam.demo.settings import DemoSettings, ModelSettings, TrainingSettings
from mergekit_dam.demo.texts import DOMAINS, make_corpus
from mergekit_dam.demo.training import draw, new_model, pack_documents, train, train_tokenizer
from mergekit_dam.errors import DamError

TINY = DemoSettings(
    train_characters=30_000,
    english_characters=30_000,
    held_out_characters=6_000,
    sequence_length=32,
    calibration_samples=8,
    test_sequences=8,
    model=ModelSettings(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        layers=2,
        heads=2,
        key_value_heads=1,
    ),
    pretraining=TrainingSettings(steps=8, matrix_rate=0.02, other_rate=0.01, matrices_by_muon=True),
    finetuning=TrainingSettings(steps=4, matrix_rate=2e-3, other_rate=2e-3, matrices_by_muon=False),
)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(train=30_000, english=30_000, held_out=6_000, seed=0)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    documents = [text for split in corpus.domains.values() for text in split.train]
    return train_tokenizer(documents, vocab_size=TINY.model.vocab_size)


@pytest.fixture(scope="module")
def sequences(corpus, tokenizer):
    """The training text of one domain."""
    return pack_documents(
        corpus.domains["records"].train, tokenizer, sequence_length=TINY.sequence_length
    )


def test_the_text_follows_from_the_seed(corpus):
    assert make_corpus(train=30_000, english=30_000, held_out=6_000, seed=0) == corpus
    other = make_corpus(train=30_000, english=30_000, held_out=6_000, seed=1)
    for domain in DOMAINS:
        assert not set(corpus.domains[domain].test) & set(other.domains[domain].test)


def test_no_document_stands_in_two_parts(corpus):
    assert tuple(corpus.domains) == DOMAINS
    for split in corpus.domains.values():
        parts = (split.train, split.calibration, split.test)
        assert len(set().union(*parts)) == sum(map(len, parts))
        for part, characters in zip(parts, (30_000, 6_000, 6_000), strict=True):
            assert sum(map(len, part)) >= characters


def test_no_source_file_stands_in_two_parts(monkeypatch):
    sources = [
        "".join(f"value_{number}_{line} = '{'x' * 40}'\n" for line in range(100))
        + f'def function_{number}():\n    """{"Words. " * 30}"""\n'
        for number in range(40)
    ]
    monkeypatch.setattr(texts, "_sources", lambda rng: iter(sources))
    corpus = make_corpus(train=20_000, english=20_000, held_out=4_000, seed=0)
    split = corpus.domains["python"]

    def files(part):
        return {number for text in part for number in re.findall(r"value_(\d+)_", text)}

    parts = [files(part) for part in (split.train, split.calibration, split.test)]
    assert all(parts)
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert len(parts[2]) == len(split.test)  # one excerpt a file


def test_the_standard_library_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DamError, match="has 0: use a Python that was installed with its sources"):
        make_corpus(train=100, english=100, held_out=100, seed=0)


def test_word_problems_are_solved_correctly():
    rng = random.Random(0)
    for _ in range(300):
        answer = word_problem(rng).partition("Answer: ")[2]
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", answer)
        assert equations
        operations = {
            "+": int.__add__,
            "-": int.__sub__,
            "*": int.__mul__,
            "/": int.__floordiv__,
        }
        for left, operation, right, result in equations:
            assert operations[operation](int(left), int(right)) == int(result)
        assert re.search(rf"\b{equations[-1][3]}\b", answer.rpartition("= ")[2].partition(" ")[2])


def test_the_fields_of_a_record_agree():
    rng = random.Random(0)
    for _ in range(100):
        record = json.loads(person_record(rng))
        first, last = record["name"].split()
        assert record["mail"] == f"{first}.{last}@{record['city']}.example".lower()
        assert record["id"].startswith(first[0] + last[0] + "-")


def test_docstrings_are_the_base_text(corpus):
    assert corpus.english
    split = corpus.domains["python"]
    held_out = "".join(split.calibration + split.test)
    assert not any(text in held_out for text in corpus.english)


def test_the_tokenizer_keeps_text_and_digits_and_loads_again(tokenizer, tmp_path):
    text = "def f(x):\n\treturn 1234 + x  # naïve\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert {"1", "2", "3", "4"} <= set(tokenizer.convert_ids_to_tokens(ids))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


def test_drawing_keeps_shares_and_repeats_what_is_short():
    parts = [torch.zeros(3, 4, dtype=torch.int64), torch.ones(50, 4, dtype=torch.int64)]
    drawn = draw(parts, [0.25, 0.75], count=40, seed=0)
    assert drawn.shape == (40, 4)
    assert drawn[:, 0].sum() == 30
    assert torch.equal(drawn, draw(parts, [0.25, 0.75], count=40, seed=0))
    assert not torch.equal(drawn, draw(parts, [0.25, 0.75], count=40, seed=1))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_muon_drives_singular_values_to_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update = orthogonalised(matrix)
    assert update.shape == shape
    values = torch.linalg.svdvals(update.double())
    assert values.min() > 0.6
    assert values.max() < 1.3
    # the directions stay: with a = U S V', the update is U f(S) V', so a' @ update is symmetric
    product = matrix.T @ update
    assert torch.allclose(product, product.T, atol=1e-3)


def test_training_learns_gives_equal_bits_and_leaves_its_start_alone(sequences, tokenizer):
    start = new_model(TINY, tokenizer)
    before = {name: weight.clone() for name, weight in start.state_dict().items()}
    batch = draw([sequences], [1.0], count=TINY.pretraining.sequences, seed=0)
    first = train(start, batch, TINY.pretraining, name="first")
    second = train(start, batch, TINY.pretraining, name="second")
    for name, weight in second.state_dict().items():
        assert torch.equal(first.state_dict()[name], weight)
        assert torch.equal(start.state_dict()[name], before[name])
    assert not torch.are_deterministic_algorithms_enabled()
    with torch.no_grad():
        losses = [m(input_ids=batch, labels=batch).loss.item() for m in (start, first)]
    assert losses[1] < losses[0] - 0.5


def test_training_ends_early_when_it_is_asked_to(sequences, tokenizer):
    start = new_model(TINY, tokenizer)
    batch = draw([sequences], [1.0], count=TINY.pretraining.sequences, seed=0)
    asked = iter([False, False, True])
    train(start, batch, TINY.pretraining, name="three", ended=lambda: next(asked))
    assert next(asked, None) is None


def test_specialists_that_train_side_by_side_are_those_of_one_after_the_other(corpus, tokenizer):
    texts = [
        pack_documents(corpus.domains[name].train, tokenizer, sequence_length=TINY.sequence_length)
        for name in DOMAINS
    ]
    base = new_model(TINY, tokenizer)
    together = train_specialists(base, texts, TINY)
    for name, own, sequences in zip(DOMAINS, together, texts, strict=True):
        drawn = draw([sequences], [1.0], count=TINY.finetuning.sequences, seed=TINY.seed + 1)
        alone = train(base, drawn, TINY.finetuning, name=name).state_dict()
        assert all(torch.equal(alone[key], value) for key, value in own.state_dict().items())
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_interrupt_ends_all_trainings(sequences, tokenizer, monkeypatch):
    long = replace(TINY, finetuning=replace(TINY.finetuning, steps=100_000, batch_size=1))
    monkeypatch.setattr(
        "mergekit_dam.demo.run.draw", lambda *_, **__: sequences[:1].repeat(9999, 1)
    )
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        train_specialists(new_model(TINY, tokenizer), [sequences] * 3, long)


@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_what_mergekit_reads(method, tmp_path):
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe(method, tmp_path, TINY)))
    assert config.merge_method == method
    assert [entry.model.model.path for entry in config.models or ()] == [
        (tmp_path / domain).as_posix() for domain in DOMAINS
    ]


@pytest.mark.parametrize("method", METHODS)
def test_relative_paths_are_not_taken_for_names_on_the_hub(method):
    paths = re.findall(r"(\S*demo/\S*)", recipe(method, Path("demo"), TINY).partition("\n")[2])
    assert len(paths) >= len(DOMAINS)
    assert all(path.startswith("./demo/") for path in paths)


def test_recovery_is_nothing_for_linear_and_all_for_the_own_specialist():
    specialists = {
        name: {domain: 1.0 if domain == name else 3.0 for domain in DOMAINS} for name in DOMAINS
    }
    flat = {
        name: dict.fromkeys(DOMAINS, value)
        for name, value in (("linear", 2.0), ("home", 1.0), ("half", 1.5))
    }
    result = DemoResult(specialists | flat)
    assert [result.recovery(name) for name in flat] == [0.0, 1.0, 0.5]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = CliRunner().invoke(main, ["demo", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds other files: name a folder that is new, empty" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_mergekit_would_misread_is_refused(tmp_path):
    result = CliRunner().invoke(main, ["demo", str(tmp_path / "a+b")])
    assert result.exit_code == 1
    assert "has a + or @ in its path" in result.output
    assert not (tmp_path / "a+b").exists()


@pytest.mark.slow
def test_a_run_makes_models_merges_them_and_measures_all(tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("mine")
    result = run_demo(tmp_path, settings=TINY, force=True)
    assert tuple(result.losses) == ("base", *DOMAINS, *METHODS)
    assert json.loads((tmp_path / "losses.json").read_text()) == result.losses
    assert all(0 < loss < 20 for losses in result.losses.values() for loss in losses.values())
    assert result.recovery("linear") == 0
    assert (tmp_path / "merged" / "dam" / "dam_coefficients.safetensors").is_file()
    shown = capfd.readouterr()
    assert shown.out == ""
    for method in METHODS:
        assert f"$ mergekit-yaml {tmp_path}/{method}.yaml {tmp_path}/merged/{method}" in shown.err
    header, *rows = result.table().splitlines()
    assert header.split() == ["nats", "per", "token", *DOMAINS, "recovery"]
    assert [row.split()[0] for row in rows] == list(result.losses)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / MARKER).read_text())["settings"]["seed"] == 0
