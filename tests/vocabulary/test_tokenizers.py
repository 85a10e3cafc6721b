"""Loading tokenizers of models and adapters; agreement between models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mergekit_dam.errors import CalibrationError
from mergekit_dam.vocabulary.tokenizers import check_agreement, load_tokenizer

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


def agree(tokenizers: dict[str, Any], texts: dict[str, list[int]]) -> None:
    check_agreement(tokenizers, {model: torch.tensor([ids]) for model, ids in texts.items()})


def reserved(*words: str, added: str) -> PreTrainedTokenizerFast:
    """Words, and one token that was added to them."""
    tokenizer = word_level(*words)
    tokenizer.add_tokens([added], special_tokens=True)
    return tokenizer


def test_equal_vocabularies_agree(tokenizer: Any) -> None:
    every = list(range(len(tokenizer)))
    agree({"a": tokenizer, "b": tokenizer}, {"a": every, "b": every})
    agree({}, {})


def test_tokens_that_only_one_model_has_are_no_disagreement() -> None:
    more = {"x": word_level("a", "b"), "y": word_level("a", "b", "c")}
    agree(more, {"x": [0, 1], "y": [0, 1, 2]})
    agree(dict(reversed(more.items())), {"y": [0, 1, 2], "x": [0, 1]})


def test_ids_of_no_token_are_no_disagreement() -> None:
    agree({"x": word_level("a", "b"), "y": word_level("a", "b")}, {"x": [0, 7], "y": [7]})


def test_another_token_on_an_id_is_a_disagreement() -> None:
    both = {"x": word_level("a", "b", "c"), "y": word_level("a", "d", "e")}
    with pytest.raises(CalibrationError) as caught:
        agree(both, {"x": [0, 1, 2], "y": [0]})
    message = str(caught.value)
    assert "x and y: 2 tokens differ, for example id 1 is 'b' in one, 'd' in the other" in message
    assert "`tokenizer: {source: union}`" in message


def test_another_id_for_a_token_is_a_disagreement() -> None:
    moved = word_level("a", "b", "c")
    extended = word_level("a", "b")
    extended.add_tokens(["x", "c"])
    with pytest.raises(CalibrationError, match="id 2 is 'c' in one, 'x' in the other"):
        agree({"one": moved, "two": extended}, {"one": [2], "two": [2]})
    with pytest.raises(CalibrationError, match="'c' is id 2 in one, id 3 in the other"):
        agree({"one": moved, "two": extended}, {"one": [2]})
    agree({"one": moved, "two": extended}, {"one": [0, 1], "two": [0, 1]})
    lone = word_level("a")
    vocabulary = {"a": 0, "b": 2}
    gap = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "a")))
    with pytest.raises(CalibrationError, match="'b' is id 1 in one, id 2 in the other"):
        agree({"zero": lone, "one": word_level("a", "b"), "two": gap}, {"one": [0]})


def test_two_models_that_extend_a_third_differently_disagree_if_their_texts_do() -> None:
    base, left, right = word_level("a", "b"), word_level("a", "b"), word_level("a", "b")
    left.add_tokens(["left"])
    right.add_tokens(["right"])
    extended = {"base": base, "l": left, "r": right}
    with pytest.raises(CalibrationError, match="l and r: 1 tokens differ"):
        agree(extended, {"l": [0, 2], "r": [1, 2]})
    agree(extended, {"l": [0, 2], "r": [0, 1]})


def test_a_reserved_token_may_have_been_renamed() -> None:
    base, chat = reserved("a", "b", added="<reserved>"), reserved("a", "b", added="<turn>")
    agree({"base": base, "chat": chat}, {"chat": [0, 2]})
    agree({"base": base, "chat": chat}, {"chat": [0, 2], "base": [0, 1]})
    with pytest.raises(CalibrationError, match="id 2 is '<reserved>' in one, '<turn>' in the oth"):
        agree({"base": base, "chat": chat}, {"chat": [0, 2], "base": [2]})
    ordinary = word_level("a", "b", "[unused]")
    agree({"base": ordinary, "chat": chat}, {"chat": [0, 2], "base": [0]})
    moved = reserved("a", "<turn>", added="<reserved>")
    with pytest.raises(CalibrationError, match="base and chat: 1 tokens differ"):
        agree({"base": moved, "chat": chat}, {"chat": [0]})
    turned = reserved("a", "c", "b", added="<turn>")
    with pytest.raises(CalibrationError, match="'<turn>' is id 3 in one, id 2 in the other"):
        agree({"base": turned, "chat": reserved("a", "c", added="<turn>")}, {"chat": [2]})
