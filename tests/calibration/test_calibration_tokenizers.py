"""Loading tokenizers of models and adapters; agreement between models."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mergekit_dam.calibration import check_agreement, load_tokenizer
from mergekit_dam.errors import CalibrationError

# mergekit's unpickler names numpy.core, which numpy 2 warns of; it is no fault of ours.
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")


def reference(text: str) -> Any:
    from mergekit.common import ModelReference

    return ModelReference.parse(text)


def word_level(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "a")))


def save(tokenizer: Any, path: Path) -> str:
    tokenizer.save_pretrained(path)
    return str(path)


def test_the_models_own_tokenizer_is_loaded(tmp_path: Path, tokenizer: Any) -> None:
    model = reference(save(tokenizer, tmp_path / "model"))
    assert load_tokenizer(model, False).get_vocab() == tokenizer.get_vocab()


def test_an_adapters_tokenizer_comes_first_and_else_the_bases(tmp_path: Path) -> None:
    base = save(word_level("a", "b"), tmp_path / "base")
    with_own = save(word_level("a", "b", "c"), tmp_path / "own")
    without = tmp_path / "without"
    without.mkdir()
    assert len(load_tokenizer(reference(f"{base}+{with_own}"), False)) == 3
    assert len(load_tokenizer(reference(f"{base}+{without}"), False)) == 2


def test_a_model_without_a_tokenizer_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"the tokenizer of .* cannot be loaded.*tokenizer_"):
        load_tokenizer(reference(str(tmp_path)), False)


def test_code_from_the_hub_needs_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("set the option `trust_remote_code=True` to remove this error")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(CalibrationError, match="pass --trust-remote-code"):
        load_tokenizer(reference("org/model"), False)


def test_equal_vocabularies_agree(tokenizer: Any) -> None:
    check_agreement({"a": tokenizer, "b": tokenizer})
    check_agreement({})


def test_tokens_that_only_one_model_has_are_no_disagreement() -> None:
    check_agreement({"x": word_level("a", "b"), "y": word_level("a", "b", "c")})
    check_agreement({"y": word_level("a", "b", "c"), "x": word_level("a", "b")})


def test_another_token_on_an_id_is_a_disagreement() -> None:
    with pytest.raises(CalibrationError) as caught:
        check_agreement({"x": word_level("a", "b", "c"), "y": word_level("a", "d", "e")})
    message = str(caught.value)
    assert "x and y: 2 tokens differ, for example id 1 is 'b' in one, 'd' in the other" in message
    assert "mergekit-tokensurgeon" in message


def test_another_id_for_a_token_is_a_disagreement() -> None:
    moved = word_level("a", "b", "c")
    extended = word_level("a", "b")
    extended.add_tokens(["x", "c"])
    with pytest.raises(CalibrationError, match="id 2 is 'c' in one, 'x' in the other"):
        check_agreement({"one": moved, "two": extended})
    lone = word_level("a")
    with pytest.raises(CalibrationError, match="'b' is id 1 in one, id 2 in the other"):
        vocabulary = {"a": 0, "b": 2}
        gap = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "a")))
        check_agreement({"zero": lone, "one": word_level("a", "b"), "two": gap})


def test_two_models_that_extend_a_third_differently_disagree() -> None:
    base = word_level("a", "b")
    left, right = word_level("a", "b", "left"), word_level("a", "b", "right")
    with pytest.raises(CalibrationError, match="l and r: 1 tokens differ"):
        check_agreement({"base": base, "l": left, "r": right})
