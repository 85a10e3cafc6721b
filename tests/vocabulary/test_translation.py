"""A merged vocabulary, and one model's ids as those of it."""

from pathlib import Path

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from transformers import PreTrainedTokenizerFast

from mergekit_dam.errors import CalibrationError
from mergekit_dam.host.vocabulary import build_vocabulary
from mergekit_dam.vocabulary.merged import Vocabulary
from mergekit_dam.vocabulary.translation import Translation
from tests.kit.models import tiny_llama_config
from tests.kit.tokenizers import BYTES, bpe


def translations(
    folder: Path,
    base: PreTrainedTokenizerFast,
    other: PreTrainedTokenizerFast,
    source: str = "base",
) -> tuple[Vocabulary, Translation]:
    """The vocabulary of a merge of a base and another model, and that model's tokens in it."""
    models = []
    for name, tokenizer in (("base", base), ("other", other)):
        tiny_llama_config(vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        models.append(ModelReference.model_validate(str(folder / name)))
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "linear",
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / "other")}],
            "tokenizer": {"source": source},
        }
    )
    vocabulary = build_vocabulary(config, models, False)
    assert vocabulary is not None
    return vocabulary, Translation(vocabulary, models[1], other)


def test_ids_are_those_of_the_same_tokens(tmp_path: Path) -> None:
    _, other = translations(tmp_path, bpe(["a", "b", "c"]), bpe(["c", "a", "b"]))
    found = other.translated(torch.tensor([[0, 1], [2, 0]]))
    assert torch.equal(found, torch.tensor([[2, 0], [1, 2]]))


def test_tokens_that_a_model_lacks_and_padding_are_unknown_to_it(tmp_path: Path) -> None:
    vocabulary, other = translations(tmp_path, bpe(["a", "b"]), bpe(["c", "a"]), "union")
    base = next(model for model in vocabulary.info.permutations if model != other.model)
    assert torch.equal(other.translated(torch.tensor([0, 1])), torch.tensor([2, 0]))
    for model, expected in ((base, [False, False, True]), (other.model, [False, True, False])):
        unknown = vocabulary.unknown_to(model)
        assert unknown is not None
        assert unknown.tolist() == expected
    _, alike = translations(tmp_path / "alike", bpe(["a", "b"]), bpe(["b", "a"]))
    assert alike.vocabulary.unknown_to(alike.model) is None


def test_a_token_is_cut_as_the_merged_tokenizer_cuts_it(tmp_path: Path) -> None:
    base = bpe(["a", "b", "ab"], [("a", "b")])
    own = bpe(
        ["ab", "b", "a", "ba", "bab", "abbab"], [("a", "b"), ("b", "a"), ("b", "ab"), ("ab", "bab")]
    )
    _, other = translations(tmp_path, base, own)
    names = own.get_vocab()
    cut = other.spelled(names["abbab"])
    assert cut == (names["ab"], names["b"], names["ab"])
    assert torch.equal(other.translated(torch.tensor(cut)), torch.tensor([2, 1, 2]))
    assert other.spelled(names["ab"]) == (names["ab"],)


def test_pieces_that_one_of_the_models_lacks_are_no_way_to_write_it(tmp_path: Path) -> None:
    own = bpe(["a", "b", "c", "bb", "ac"], [("b", "b"), ("a", "c")])
    _, other = translations(tmp_path, bpe(["a", "b"]), own)
    assert other.spelled(3) == (1, 1)
    assert other.spelled(4) == (4,)  # the merged model has no c
    with pytest.raises(CalibrationError, match=r"its text has 2 tokens \(c, ac\) that the merged"):
        other.translated(torch.tensor([0, 2, 4, 4]))
    base = bpe(["a", "b", "c", "bc"], [("b", "c")])
    own = bpe(["a", "b", "c", "abc", "ab"], [("a", "b"), ("ab", "c")])
    _, other = translations(tmp_path / "pieces", base, own)
    assert other.spelled(3) == (3,)  # the model has no bc


def test_bytes_stand_for_what_the_merged_model_has_no_letter_for(tmp_path: Path) -> None:
    base, own = bpe(["a", *BYTES]), bpe([*BYTES, "a", "aä"], [])
    _, other = translations(tmp_path, base, own)
    names = own.get_vocab()
    assert other.spelled(names["aä"]) == (names["a"], names["<0xC3>"], names["<0xA4>"])


def test_added_tokens_are_not_cut(tmp_path: Path) -> None:
    own = bpe(["a", "b"])
    own.add_tokens(["aab"])
    own.add_tokens(["ab"], special_tokens=True)
    _, other = translations(tmp_path, bpe(["a", "b"]), own)
    assert [other.spelled(number) for number in (2, 3)] == [(2,), (3,)]


def test_a_token_that_two_tokenizers_of_a_model_number_differently_is_lost(tmp_path: Path) -> None:
    """An adapter's own tokenizer is not what mergekit goes by."""
    _, other = translations(tmp_path, bpe(["a", "b", "c"]), bpe(["a", "b", "c"]))
    adapted = Translation(other.vocabulary, other.model, bpe(["a", "c", "b", "d"]))
    assert torch.equal(adapted.translated(torch.tensor([0])), torch.tensor([0]))
    with pytest.raises(CalibrationError, match=r"3 tokens \(c, b, d\) that the merged"):
        adapted.translated(torch.tensor([0, 1, 2, 3]))


def test_special_tokens_have_the_ids_of_the_merged_vocabulary(tmp_path: Path) -> None:
    base, own = bpe(["a", "b", "c", "d"]), bpe(["d", "b", "a"])
    own.add_special_tokens({"eos_token": "b"})
    vocabulary, _ = translations(tmp_path, base, own, str(tmp_path / "other"))
    config = tiny_llama_config(bos_token_id=0, eos_token_id=[1, 2, 3], pad_token_id=-1)
    vocabulary.tell(config, "vocab_size")
    assert config.vocab_size == 3
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, [1, 0], -1)
    lost = tiny_llama_config(bos_token_id=2, eos_token_id=2, pad_token_id=None)
    vocabulary.tell(lost, "vocab_size")
    assert (lost.bos_token_id, lost.eos_token_id, lost.pad_token_id) == (None, 1, None)
