"""Held-out losses: against transformers' own loss, and every bad input by its message."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_dam.errors import ArchitectureError, DamError
from mergekit_dam.evaluation import evaluation, parts, whole
from mergekit_dam.evaluation.evaluation import evaluate
from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.evaluation.sources import Judged
from mergekit_dam.evaluation.tables import format_table
from mergekit_dam.evaluation.texts import read_tokens
from mergekit_dam.evaluation.whole import cross_entropy
from tests.kit.judged import LENGTH, SETTINGS, WORDS, save_model
from tests.kit.models import ARCHITECTURES, save_models
from tests.kit.texts import save_calibration


def tokens_of(model, path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return read_tokens(path, tokenizer, SETTINGS, vocab_size=300)


def oracle(model, tokens):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():  # equal lengths: the mean over all is the mean of means
        return loaded(input_ids=tokens, labels=tokens).loss.item()


def raising(*_, **__):
    raise ArchitectureError("its blocks cannot run one by one")


def test_losses_are_those_of_transformers(judged, texts):
    result = evaluate(judged, texts, SETTINGS)
    for model in judged:
        for name, path in zip(("counting.test", "prose"), texts, strict=True):
            expected = oracle(model, tokens_of(model, path))
            assert math.isclose(result.losses[model][name], expected, rel_tol=1e-5)
    assert result.losses[judged[0]] != result.losses[judged[1]]


@pytest.mark.parametrize("whole_model", [False, True])
def test_only_answers_count_where_that_is_asked_for(judged, tmp_path, monkeypatch, whole_model):
    """Words of questions and of answers differ, so that labels can be told by their ids."""
    if whole_model:
        monkeypatch.setattr(evaluation, "in_parts", raising)
    text = tmp_path / "answers.jsonl"
    rows = [
        {"prompt": " ".join(WORDS[: 2 + i % 3]), "completion": " " + " ".join(WORDS[6 : 8 + i % 3])}
        for i in range(60)
    ]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(judged[0])
    tokens = tokens_of(judged[0], text)
    answers = set(tokenizer(" " + " ".join(WORDS[6:]), add_special_tokens=False).input_ids)
    questions = [tokenizer(" ".join(WORDS[:k])).input_ids for k in (2, 3, 4)]
    assert not answers.intersection(*questions)
    inside = torch.isin(tokens, torch.tensor(sorted(answers)))
    labels = tokens.where(inside, -100)
    labels[:, 0] = -100
    model = AutoModelForCausalLM.from_pretrained(judged[0], dtype=torch.float32)
    with torch.no_grad():
        each = [
            model(input_ids=t[None], labels=a[None]).loss
            for t, a in zip(tokens, labels, strict=True)
        ]
    result = evaluate(judged[:1], [f"{text}:loss_on=assistant"], SETTINGS)
    (found,) = result.losses[judged[0]].values()
    assert math.isclose(found, float(torch.stack(each).mean()), rel_tol=1e-5)
    (plain,) = evaluate(judged[:1], [text], SETTINGS).losses[judged[0]].values()
    assert not math.isclose(found, plain, rel_tol=1e-3)


def test_text_in_which_nothing_counts_is_refused(judged, tmp_path):
    text = tmp_path / "asked.jsonl"
    row = {"messages": [{"role": "user", "content": " ".join(WORDS * 3)}]}
    text.write_text((json.dumps(row) + "\n") * 20, encoding="utf-8")
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    asked = f"{text}:chat_template={template}:loss_on=assistant"
    with pytest.raises(DamError, match=r"no token counts with `loss_on=assistant`"):
        evaluate(judged[:1], [asked], SETTINGS)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "llama-tied", "falcon", "mixtral"])
def test_other_architectures_have_the_losses_of_transformers_too(architecture, tmp_path):
    models = save_models(tmp_path, ARCHITECTURES[architecture](), count=1)
    text = save_calibration(tmp_path / "text.jsonl")
    model = str(models.models[0])
    result = evaluate([model], [text], SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = oracle(model, read_tokens(text, tokenizer, SETTINGS, vocab_size=64))
    (found,) = result.losses[model].values()
    assert math.isclose(found, expected, rel_tol=1e-5)


def test_a_model_that_cannot_run_in_parts_is_loaded_as_a_whole(judged, texts, monkeypatch):
    in_blocks = evaluate(judged, texts, SETTINGS)

    monkeypatch.setattr(evaluation, "in_parts", raising)
    loaded = evaluate(judged, texts, SETTINGS)
    for model in judged:
        for text, losses in in_blocks.each[model].items():
            torch.testing.assert_close(loaded.each[model][text], losses, rtol=1e-5, atol=1e-5)


def test_one_block_is_read_at_a_time(judged, texts, monkeypatch):
    read = []
    stock = Judged.read

    def watched(self, names, wanted, device):
        read.append(sorted(wanted))
        return stock(self, names, wanted, device)

    monkeypatch.setattr(Judged, "read", watched)
    evaluate(judged[:1], texts, SETTINGS)
    assert len(read) == 4  # input, two blocks, output: once for both texts
    assert all(".layers.0." in name for name in read[1])
    assert all(".layers.1." in name for name in read[2])
    assert read[3] == ["lm_head.weight", "model.norm.weight"]


def test_little_room_for_hidden_states_and_logits_changes_nothing(judged, texts, monkeypatch):
    expected = evaluate(judged, texts, SETTINGS)
    monkeypatch.setattr(parts, "HIDDEN_STATES", 1)
    monkeypatch.setattr(parts, "LOGITS", 3 * 300)
    found = evaluate(judged, texts, SETTINGS)
    for model in judged:
        for text, losses in expected.each[model].items():
            torch.testing.assert_close(found.each[model][text], losses)


def test_batch_size_and_bounded_logits_do_not_change_the_loss(judged, texts, monkeypatch):
    tokens = tokens_of(judged[0], texts[0])
    model = AutoModelForCausalLM.from_pretrained(judged[0])
    expected = cross_entropy(model, tokens, batch_size=5)
    assert math.isclose(cross_entropy(model, tokens, batch_size=2), expected, rel_tol=1e-6)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(whole, "LOGITS_AT_ONCE", 2 * LENGTH * 300 + 1)
    assert math.isclose(cross_entropy(model, tokens, batch_size=5), expected, rel_tol=1e-6)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_half_precision_is_near_single_precision(dtype, judged, texts):
    settings = EvaluationSettings(sequence_length=LENGTH, sequences=5, dtype=dtype)
    found, expected = (evaluate(judged[:1], texts, s) for s in (settings, SETTINGS))
    tolerance = 0.02 if dtype == "bfloat16" else 1e-6  # the files are fp32
    for text, loss in expected.losses[judged[0]].items():
        assert math.isclose(found.losses[judged[0]][text], loss, rel_tol=tolerance)
    assert (found.losses == expected.losses) == (dtype == "auto")


def test_every_model_reads_the_same_tokens_and_all_there_are(judged, texts):
    short = texts[0].with_name("short.txt")
    short.write_text(" ".join(WORDS * 4))
    result = evaluate(judged, [*texts, short], SETTINGS)
    assert result.sequences[judged[0]] == result.sequences[judged[1]]
    assert result.sequences[judged[0]]["counting.test"] == 5
    assert 1 <= result.sequences[judged[0]]["short"] < 5


def test_options_of_a_text_are_those_of_calibration(judged, texts):
    result = evaluate(judged, [f"few={texts[0]}:samples=2:column=text", texts[1]], SETTINGS)
    assert result.sequences[judged[0]] == {"few": 2, "prose": 5}
    with pytest.raises(DamError, match="`share` is for calibration text alone"):
        evaluate(judged, [f"{texts[0]}:share=0.5"], SETTINGS)
    with pytest.raises(DamError, match="a model's own text judges nothing"):
        evaluate(judged, ["self"], SETTINGS)


def test_another_tokenizer_is_warned_of_and_not_compared(judged, texts, tmp_path, caplog):
    other = save_model(tmp_path / "other", seed=0, text=["zebras and quaggas"] * 9)
    result = evaluate([judged[0], other], texts, SETTINGS, baseline=judged[0])
    assert "other: the tokenizer differs" in caplog.text
    assert result.difference(other)["prose"] is None
    assert result.difference(other)["mean"] is None
    caplog.clear()
    evaluate(judged, texts, SETTINGS)
    assert "differs" not in caplog.text


def test_texts_with_one_name_are_distinguished(judged, texts, tmp_path):
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b" / "prose.txt"
    twin.write_text(texts[1].read_text())
    result = evaluate(judged[:1], [*texts, twin], SETTINGS)
    assert list(result.texts) == ["counting.test", texts[1].as_posix(), twin.as_posix()]


@pytest.mark.parametrize("name", ["prose", "mean"])
def test_a_name_that_is_taken_is_refused(name, judged, texts):
    with pytest.raises(DamError, match=rf"'{name}' is the name of .*write another NAME="):
        evaluate(judged, [texts[1], f"{name}={texts[0]}"], SETTINGS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("a/b+./nowhere", "nowhere does not exist"),
        ("{folder}", "is a folder without config.json"),
        ("{text}", "is a file"),
    ],
)
def test_a_path_that_is_no_model_is_refused_before_any_work(model, message, texts, tmp_path):
    (tmp_path / "empty").mkdir()
    name = model.format(folder=tmp_path / "empty", text=texts[0])
    with pytest.raises(DamError, match=message):
        evaluate([name], texts, SETTINGS)


def test_weights_that_do_not_load_are_named(texts, tmp_path):
    broken = save_model(tmp_path / "broken", seed=0)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DamError, match=r"broken.model\.safetensors: damaged"):
        evaluate([broken], texts, SETTINGS)


def test_a_device_that_is_not_there_is_refused(judged, texts):
    settings = EvaluationSettings(device="nonesuch")
    with pytest.raises(DamError, match="the device 'nonesuch' cannot be used"):
        evaluate(judged, texts, settings)


def test_too_little_text_is_refused_with_a_remedy(judged, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("one two")
    with pytest.raises(DamError, match="less than one sequence of 16: add text"):
        evaluate(judged, [short], SETTINGS)


def test_a_table_is_aligned_and_knows_no_negative_zero():
    table = format_table(["loss", "a"], [("x", [-0.0001]), ("longer", [-12.3456])])
    assert table.splitlines() == ["loss          a", "x         0.000", "longer  -12.346"]


def test_a_model_that_lacks_a_weight_is_refused(texts, tmp_path):
    folder = Path(save_model(tmp_path / "lacks", seed=0))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "up_proj" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamError, match=rf"{folder} has no weights for {name}"):
        evaluate([str(folder)], texts, SETTINGS)


def test_weights_that_are_no_numbers_are_refused_by_name(texts, tmp_path):
    folder = Path(save_model(tmp_path / "nan", seed=0))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "up_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamError, match=rf"{folder}: {name} has"):
        evaluate([str(folder)], texts, SETTINGS)
