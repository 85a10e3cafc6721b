"""Text in a merged vocabulary: how words are written, and what is warned of."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_dam.demo.training import train_tokenizer
from mergekit_dam.evaluation.evaluation import evaluate
from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.host.prepare import prepare
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import EMBEDDING, HEAD, Models, make_model, tiny_llama_config
from tests.kit.texts import save_text
from tests.kit.tokenizers import VOCABULARY, word_tokenizer
from tests.kit.vocabularies import LENGTH, Pair, one_hot


def test_losses_of_a_model_and_of_its_union_compare(
    pair: Pair, union: Merged, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Same tokens by other ids are no other tokens; a model that lacks words is warned of."""
    coefficients = str(one_hot(union, 1, tmp_path / "coefficients"))
    only = merge(pair.dam(coefficients=coefficients), tmp_path / "only")
    names = [str(pair.models[1]), str(only.path)]
    settings = EvaluationSettings(sequence_length=LENGTH, sequences=4)
    found = evaluate(names, [pair.texts[1]], settings).losses
    assert "differs" not in caplog.text
    own, merged = (found[name]["right"] for name in names)
    assert own < merged < own + 1  # tokens of the left model take some of the mass
    evaluate([names[0], str(pair.models[0])], [pair.texts[1]], settings)
    assert f"{pair.models[0]}: the tokenizer differs" in caplog.text


SENTENCES = (
    "the cat sat on the mat and the bat saw that the hat was fat",
    "der hund und die katze und der hase sassen in einem haus",
)


def save_languages(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Models with byte-pair tokenizers of two languages, and their texts."""
    models, texts = [], []
    for index, sentence in enumerate(SENTENCES):
        tokenizer = train_tokenizer([sentence] * 20, vocab_size=300)
        model = make_model(tiny_llama_config(vocab_size=len(tokenizer)), seed=index)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        models.append(folder)
        texts.append(save_text(tmp_path / f"{index}.jsonl", sentence.split(), seed=index))
    return models, texts


def test_words_that_the_base_lacks_are_written_in_its_pieces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models, texts = save_languages(tmp_path)
    configuration = dam(models, texts, settings={"tokenizer": {"source": "base"}})
    merged = merge(configuration, tmp_path / "out")
    assert merged.load().config.vocab_size == len(AutoTokenizer.from_pretrained(models[0]))
    config = MergeConfiguration.model_validate(configuration)
    calibration = prepare(config, MergeOptions(quiet=True)).calibration
    read = AutoTokenizer.from_pretrained(merged.path)
    for ids, sentence in zip(calibration.values(), SENTENCES, strict=True):
        for row in ids.tokens:
            # Words at the edges of a sequence may be cut off; documents begin with a token.
            words = str(read.decode(row)).replace(str(read.bos_token), " ").split()[1:-1]
            assert words
            assert set(words) <= set(sentence.split())
    cut = [merged.report["calibration"][model.name]["cut"] for model in models]
    assert not any("were cut into others" in said for said in cut[0])
    assert any("tokens that the merged model will not have were cut" in said for said in cut[1])
    assert "in other tokens" not in caplog.text


def test_a_text_that_the_merged_model_will_read_otherwise_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """mergekit adds byte-pair tokens to a union by names that no text has."""
    models, texts = save_languages(tmp_path)
    merged = merge(dam(models, texts, settings={"tokenizer": {"source": "union"}}), tmp_path / "o")
    assert f"calibration of {models[1]}: the merged model's tokenizer reads " in caplog.text
    assert f"calibration of {models[0]}: the merged model's tokenizer reads" not in caplog.text
    cut = merged.report["calibration"][models[1].name]["cut"]
    share = next(said for said in cut if "of this text in other tokens" in said)
    assert 30 < int(re.findall("reads ([0-9]+)%", share)[0]) <= 100


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize(
    "fit",
    [{}, {"objective": "layer+logits", "metric": "sensitivity", "steps": 2}],
    ids=["layer", "layer+logits"],
)
def test_a_model_with_other_ids_for_its_tokens_is_merged_to_the_same_bytes(
    llama_models: Models,
    calibration: tuple[Path, Path],
    tmp_path: Path,
    fit: dict[str, Any],
    source: str,
) -> None:
    first, second = llama_models.models
    settings = {"tokenizer": {"source": source}}
    same = merge(dam([first, second], calibration, settings=settings, **fit), tmp_path / "same")
    order = torch.randperm(len(VOCABULARY), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = word_tokenizer([VOCABULARY[own] for own in order])
    model = AutoModelForCausalLM.from_pretrained(second)
    with torch.no_grad():
        for name in (EMBEDDING, HEAD):
            rows = model.get_parameter(name)
            rows[: len(order)] = rows[order]
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, special, getattr(tokenizer, special))
    model.save_pretrained(tmp_path / "shuffled")
    tokenizer.save_pretrained(tmp_path / "shuffled")
    shuffled = [first, tmp_path / "shuffled"]
    merged = merge(dam(shuffled, calibration, settings=settings, **fit), tmp_path / "out")
    assert merged.model_bytes == same.model_bytes
    assert merged.coefficients.coefficients.keys() == same.coefficients.coefficients.keys()
