"""Merges of models whose tokenizers differ, through mergekit's own entry point, to the end.

Two models, `left` and `right`: each knows 16 words, half of which the other knows too, by other
ids; their special tokens have other ids as well, and their embeddings other numbers of rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mergekit_dam.coefficients import CoefficientFile
from tests.merging import Merged, dam, merge, tensors_of
from tests.models import fine_tune, make_model, tiny_llama_config

# Of one length, so that no word is found in another: an added token is cut out of any text.
SHARED = ("aba", "abe", "abi", "abo", "abu", "aca", "ace", "aci")
LEFT = ("fob", "fod", "fog", "fol", "fom", "fon", "fop", "fot")
RIGHT = ("gub", "gud", "gug", "gul", "gum", "gun", "gup", "gut")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
LEFT_VOCABULARY = (*SPECIAL, *SHARED, *LEFT)
RIGHT_VOCABULARY = (*RIGHT, *reversed(SHARED), *reversed(SPECIAL))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LENGTH = 16


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word; begins every text with <s>."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    backend = Tokenizer(tokenizer_models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def save_text(path: Path, words: Sequence[str], seed: int = 0) -> Path:
    """Documents of random words, some of them more often than others."""
    generator = torch.Generator().manual_seed(seed)
    chances = 1.0 / torch.arange(1, len(words) + 1)
    drawn = torch.multinomial(chances, 64 * 24, replacement=True, generator=generator)
    lines = [" ".join(words[i] for i in row) for row in drawn.reshape(64, 24).tolist()]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Pair:
    """The two models, and text in the words of each."""

    models: tuple[Path, Path]
    texts: tuple[Path, Path]
    shared: Path

    def dam(self, tokenizer: Mapping[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
        """A configuration; by default, with the union of both vocabularies."""
        settings = {"tokenizer": dict(tokenizer or {"source": "union"})}
        return dam(self.models, self.texts, settings=settings, **parameters)


def save_pair(folder: Path, *, tied: bool = False) -> Pair:
    """Write the models, fine-tunes of one base in all but their vocabularies, and their texts."""
    models = []
    for index, vocabulary in enumerate((LEFT_VOCABULARY, RIGHT_VOCABULARY)):
        tokenizer = word_tokenizer(vocabulary)
        config = tiny_llama_config(
            vocab_size=(24, 26)[index],
            tie_word_embeddings=tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = make_model(config)
        words = sorted({*LEFT_VOCABULARY, *RIGHT_VOCABULARY})
        places = torch.tensor([words.index(word) for word in vocabulary])
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
                rows = torch.randn(len(words), 16, generator=generator) / 4
                model.get_parameter(name)[: len(vocabulary)] = rows[places]
        fine_tune(model, seed=index + 1, scale=0.3)
        path = folder / ("left", "right")[index]
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        models.append(path)
    texts = (
        save_text(folder / "left.jsonl", LEFT_VOCABULARY[4:], seed=0),
        save_text(folder / "right.jsonl", RIGHT_VOCABULARY[:16], seed=1),
    )
    return Pair((models[0], models[1]), texts, save_text(folder / "shared.jsonl", SHARED, seed=2))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def union(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """Both vocabularies in one, and layers fitted."""
    return merge(pair.dam(), tmp_path_factory.mktemp("union") / "out")


def one_hot(merged: Merged, source: int, path: Path) -> Path:
    """Coefficients that take everything of one source."""
    fitted = merged.coefficients
    rows = {name: torch.zeros_like(own) for name, own in fitted.coefficients.items()}
    for own in rows.values():
        own[source] = 1
    path.mkdir()
    CoefficientFile(rows, fitted.sources, fitted.metadata).save(
        path / "dam_coefficients.safetensors"
    )
    return path


@torch.no_grad()
def logits(model: Path, tokens: Tensor) -> Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: Tensor = loaded(input_ids=tokens).logits
    return found


def lines_of(text: Path) -> list[str]:
    return [json.loads(line)["text"] for line in text.read_text("utf-8").splitlines()]


def ids_of(model: Path, lines: Sequence[str]) -> Tensor:
    """Equal numbers of words make equal numbers of ids, int64 `[lines, words]`."""
    return torch.tensor(AutoTokenizer.from_pretrained(model)(list(lines))["input_ids"])


def own_columns(model: Path, merged: Path) -> Tensor:
    """For every token of a model, in the order of its ids, its id in the merged model."""
    own = AutoTokenizer.from_pretrained(model).get_vocab()
    new = AutoTokenizer.from_pretrained(merged).get_vocab()
    return torch.tensor([new[token] for token in sorted(own, key=own.__getitem__)])


class TestUnion:
    def test_it_holds_every_token_once_and_the_base_keeps_its_ids(
        self, pair: Pair, union: Merged
    ) -> None:
        vocabulary = AutoTokenizer.from_pretrained(union.path).get_vocab()
        assert vocabulary.keys() == {*LEFT_VOCABULARY, *RIGHT_VOCABULARY}
        assert sorted(vocabulary.values()) == list(range(28))
        assert [vocabulary[word] for word in LEFT_VOCABULARY] == list(range(20))
        assert union.load().config.vocab_size == 28

    def test_embeddings_are_in_the_order_of_the_tokenizer(self, pair: Pair, union: Merged) -> None:
        for name in (EMBEDDING, HEAD):
            merged, (left, right) = (
                union.tensors[name],
                (tensors_of(model)[name] for model in pair.models),
            )
            first, second = union.coefficients.coefficients[name]
            new = AutoTokenizer.from_pretrained(union.path).get_vocab()
            for word in SHARED:
                row = first * left[LEFT_VOCABULARY.index(word)]
                row = row + second * right[RIGHT_VOCABULARY.index(word)]
                torch.testing.assert_close(merged[new[word]], row)
            for word in LEFT:
                row = left[LEFT_VOCABULARY.index(word)]
                torch.testing.assert_close(merged[new[word]], (first + second) * row)
            for word in RIGHT:
                row = right[RIGHT_VOCABULARY.index(word)]
                torch.testing.assert_close(merged[new[word]], (first + second) * row)

    @pytest.mark.parametrize("source", [0, 1])
    def test_one_hot_coefficients_are_a_model_on_its_own_tokens(
        self, pair: Pair, union: Merged, tmp_path: Path, source: int
    ) -> None:
        coefficients = str(one_hot(union, source, tmp_path / "coefficients"))
        merged = merge(pair.dam(coefficients=coefficients), tmp_path / "out")
        lines, model = lines_of(pair.texts[source]), pair.models[source]
        own, new = ids_of(model, lines), ids_of(merged.path, lines)
        columns = own_columns(model, merged.path)
        assert torch.equal(columns[own], new)
        expected = logits(model, own)[..., : len(columns)]
        torch.testing.assert_close(logits(merged.path, new)[..., columns], expected)

    def test_every_fit_is_no_worse_than_the_average(self, union: Merged) -> None:
        fitted = [e for e in union.entries.values() if e["outcome"] == "fitted"]
        assert {EMBEDDING, HEAD, "model.layers.1.mlp.down_proj.weight"} <= {
            entry["name"] for entry in fitted
        }
        assert all(entry["held_out_fitted"] < entry["held_out_start"] for entry in fitted)

    @pytest.mark.parametrize("source", [0, 1])
    def test_a_teacher_is_a_model_on_its_own_ids(
        self, pair: Pair, union: Merged, tmp_path: Path, source: int
    ) -> None:
        """Merged to be one model, what is left to tell it from that is mass on other tokens."""
        start = str(one_hot(union, source, tmp_path / "coefficients"))
        configuration = pair.dam(objective="logits", start=start, steps=1, holdout=0)
        merged = merge(configuration, tmp_path / "out")
        found = merged.report["search"][0]["held_out_kl"][source]
        only = merge(pair.dam(coefficients=start), tmp_path / "only")
        tokens = calibration_ids(only, pair.texts[source])
        known = own_columns(pair.models[source], only.path)
        of_all = logits(only.path, tokens).double()
        missing = of_all.logsumexp(-1) - of_all[..., known].logsumexp(-1)
        assert found == pytest.approx(float(missing.mean()), rel=1e-5)
        assert found > 1e-3


def calibration_ids(merged: Merged, text: Path) -> Tensor:
    """The sequences that a merge of `SMALL` makes of a text, as ids of the merged model."""
    from mergekit_dam.calibration import load_calibration

    return load_calibration(
        str(text),
        model="merged",
        tokenizer=AutoTokenizer.from_pretrained(merged.path),
        samples=4,
        sequence_length=LENGTH,
        vocab_size=28,
        seed=0,
    ).tokens
