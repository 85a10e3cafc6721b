"""Held-out losses: against transformers' own loss, and every bad input by its message."""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mergekit_dam import evaluate as evaluation
from mergekit_dam.cli import main
from mergekit_dam.demo.training import train_tokenizer
from mergekit_dam.errors import DamError
from mergekit_dam.evaluate import EvaluationSettings, cross_entropy, evaluate

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LENGTH = 16
SETTINGS = EvaluationSettings(sequence_length=LENGTH, sequences=5, batch_size=2)


def documents(count):
    return [" ".join(WORDS[(i * j) % 10] for j in range(1, 12)) + f" {i}" for i in range(count)]


def save_model(folder, *, seed, text=None):
    tokenizer = train_tokenizer(text or documents(50), vocab_size=300)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,  # far from uniform, or every model would have one loss
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save_model(root / name, seed=seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture
def texts(tmp_path):
    jsonl = tmp_path / "counting.test.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(40)))
    plain = tmp_path / "prose.txt"
    plain.write_text("Ten nine eight, and so on.\n" * 40)
    return [jsonl, plain]


def tokens_of(model, path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return evaluation.read_tokens(path, tokenizer, SETTINGS, vocab_size=300)


def test_losses_are_those_of_transformers(models, texts):
    result = evaluate(models, texts, SETTINGS)
    for model in models:
        loaded = AutoModelForCausalLM.from_pretrained(model)
        for name, path in zip(("counting.test", "prose"), texts, strict=True):
            tokens = tokens_of(model, path)
            with torch.no_grad():  # equal lengths: the mean over all is the mean of means
                oracle = loaded(input_ids=tokens, labels=tokens).loss.item()
            assert math.isclose(result.losses[model][name], oracle, rel_tol=1e-5)
    assert result.losses[models[0]] != result.losses[models[1]]


def test_batch_size_and_bounded_logits_do_not_change_the_loss(models, texts, monkeypatch):
    tokens = tokens_of(models[0], texts[0])
    model = AutoModelForCausalLM.from_pretrained(models[0])
    whole = cross_entropy(model, tokens, batch_size=5)
    assert math.isclose(cross_entropy(model, tokens, batch_size=2), whole, rel_tol=1e-6)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 2 * LENGTH * 300 + 1)
    assert math.isclose(cross_entropy(model, tokens, batch_size=5), whole, rel_tol=1e-6)
    assert seen == [2, 2, 1]


def test_every_model_reads_the_same_tokens_and_all_there_are(models, texts):
    short = texts[0].with_name("short.txt")
    short.write_text(" ".join(WORDS * 4))
    result = evaluate(models, [*texts, short], SETTINGS)
    assert result.sequences[models[0]] == result.sequences[models[1]]
    assert result.sequences[models[0]]["counting.test"] == 5
    assert 1 <= result.sequences[models[0]]["short"] < 5


def test_another_tokenizer_is_warned_of(models, texts, tmp_path, caplog):
    other = save_model(tmp_path / "other", seed=0, text=["zebras and quaggas"] * 9)
    evaluate([models[0], other], texts, SETTINGS)
    assert "other: the tokenizer differs" in caplog.text
    caplog.clear()
    evaluate(models, texts, SETTINGS)
    assert "differs" not in caplog.text


def test_texts_with_one_name_are_distinguished(texts, tmp_path):
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b" / "prose.txt"
    assert list(evaluation.name_texts([*texts, twin])) == [
        "counting.test",
        texts[1].as_posix(),
        twin.as_posix(),
    ]


def test_the_command_prints_a_table_and_writes_json(models, texts, tmp_path):
    out = tmp_path / "losses.json"
    arguments = ["evaluate", *models, "--sequence-length", str(LENGTH), "--sequences", "5"]
    arguments += [f"--data={path}" for path in texts]
    shown = CliRunner().invoke(main, [*arguments, "--json", str(out)], catch_exceptions=False)
    assert shown.exit_code == 0
    header, *rows = shown.stdout.splitlines()
    assert header.split() == ["nats", "per", "token", "counting.test", "prose", "mean"]
    written = json.loads(out.read_text())
    for row, entry in zip(rows, written["models"], strict=True):
        name, *numbers = row.split()
        assert name == entry["model"]
        values = [*entry["loss"].values(), entry["mean"]]
        assert numbers == [f"{value:.3f}" for value in values]
    piped = CliRunner().invoke(main, [*arguments, "--json", "-"], catch_exceptions=False)
    assert json.loads(piped.stdout) == written


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("{folder}", "is a folder without config.json"),
        ("{text}", "is a file"),
    ],
)
def test_a_path_that_is_no_model_is_refused_before_any_work(model, message, texts, tmp_path):
    (tmp_path / "empty").mkdir()
    name = model.format(folder=tmp_path / "empty", text=texts[0])
    with pytest.raises(DamError, match=message):
        evaluate([name], texts, SETTINGS)


def test_weights_that_do_not_load_are_named(models, texts, tmp_path):
    broken = save_model(tmp_path / "broken", seed=0)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DamError, match=r"broken.model\.safetensors: damaged"):
        evaluate([broken], texts, SETTINGS)


def test_a_device_that_is_not_there_is_refused(models, texts):
    settings = EvaluationSettings(device="nonesuch")
    with pytest.raises(DamError, match="the device 'nonesuch' cannot be used"):
        evaluate(models, texts, settings)


def test_too_little_text_is_refused_with_a_remedy(models, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("one two")
    with pytest.raises(DamError, match="less than one sequence of 16: add text"):
        evaluate(models, [short], SETTINGS)


def test_a_table_is_aligned_and_knows_no_negative_zero():
    table = evaluation.format_table(["loss", "a"], [("x", [-0.0001]), ("longer", [-12.3456])])
    assert table.splitlines() == ["loss          a", "x         0.000", "longer  -12.346"]


def test_a_model_that_lacks_a_weight_is_refused(texts, tmp_path):
    folder = Path(save_model(tmp_path / "lacks", seed=0))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "up_proj" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamError, match=rf"{folder} has no weights for {name}"):
        evaluate([str(folder)], texts, SETTINGS)


def test_a_loss_that_is_no_number_is_refused_with_the_weights_to_blame(texts, tmp_path):
    folder = Path(save_model(tmp_path / "nan", seed=0))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "up_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamError, match=rf"the loss of {folder} on .* is nan: {name} has values"):
        evaluate([str(folder)], texts, SETTINGS)


def test_json_that_cannot_be_written_is_refused_before_any_work(texts, tmp_path):
    result = CliRunner().invoke(
        main,
        ["evaluate", "./gone", "--data", str(texts[0]), "--json", str(tmp_path / "no" / "x.json")],
    )
    assert result.exit_code == 2
    assert "does not exist; name another file" in result.output
