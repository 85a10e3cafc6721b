"""The embeddings that tokens get by `tokenizer.tokens`, and tokenizers that are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mergekit_dam.errors import ConfigError
from tests.kit.merging import dam, merge, tensors_of
from tests.kit.models import EMBEDDING, HEAD, loaded, logits_of
from tests.kit.reads import watched_reads
from tests.kit.texts import calibration_tokens
from tests.kit.vocabularies import LEFT_VOCABULARY, Pair, one_hot, own_columns


class TestOverrides:
    """`tokens` in the section `tokenizer`: which embedding a token gets."""

    def test_a_new_token_gets_the_row_of_another(self, pair: Pair, tmp_path: Path) -> None:
        left = str(pair.models[0])
        source = {"kind": "model_token", "model": left, "token": "</s>"}
        tokens = {"<turn>": {"source": source}, "<nothing>": {"source": {"kind": "zero"}}}
        merged = merge(pair.dam({"source": "union", "tokens": tokens}), tmp_path / "out")
        vocabulary = AutoTokenizer.from_pretrained(merged.path).get_vocab()
        assert len(vocabulary) == merged.load().config.vocab_size == 30
        for name in (EMBEDDING, HEAD):
            row = tensors_of(pair.models[0])[name][LEFT_VOCABULARY.index("</s>")]
            sums = merged.coefficients.coefficients[name].sum(0)
            found = merged.tensors[name]
            torch.testing.assert_close(found[vocabulary["<turn>"]], sums * row)
            assert not found[vocabulary["<nothing>"]].any()

    def test_a_forced_row_is_the_merged_models_and_not_the_teachers(
        self, pair: Pair, tmp_path: Path
    ) -> None:
        tokens = {"aci": {"source": str(pair.models[0]), "force": True}}
        tokenizer = {"source": "union", "tokens": tokens}
        merged = merge(pair.dam(tokenizer), tmp_path / "out")
        new = AutoTokenizer.from_pretrained(merged.path).get_vocab()["aci"]
        for name in (EMBEDDING, HEAD):
            row = tensors_of(pair.models[0])[name][LEFT_VOCABULARY.index("aci")]
            sums = merged.coefficients.coefficients[name].sum(0)
            torch.testing.assert_close(merged.tensors[name][new], sums * row)
        # Merged to be the right model, it is that but for one row; the teacher is all of it.
        start = str(one_hot(merged, 1, tmp_path / "coefficients"))
        fit = {"objective": "logits", "start": start, "steps": 1, "holdout": 0}
        searched = merge(pair.dam(tokenizer, **fit), tmp_path / "searched")
        only = merge(pair.dam(tokenizer, coefficients=start), tmp_path / "only")
        model = pair.models[1]
        columns = own_columns(model, only.path)
        ids = calibration_tokens(
            pair.texts[1], AutoTokenizer.from_pretrained(only.path), samples=4, vocab_size=28
        )
        own = (ids[..., None] == columns).int().argmax(-1)
        assert new in ids
        wanted = logits_of(loaded(model), own)[..., : len(columns)].double().log_softmax(-1)
        got = logits_of(loaded(only.path), ids).double().log_softmax(-1)[..., columns]
        expected = float((wanted.exp() * (wanted - got)).sum(-1).mean())
        assert searched.report["search"][0]["held_out_kl"][1] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("token", "override", "message"),
        [
            ("<new>", {}, "required a `source`, since some models do not have the token"),
            ("abi", {"force": True}, "required a `source`, since `force` is set"),
            ("fob", {"source": "RIGHT"}, "RIGHT does not have the token"),
            ("<new>", {"source": "other/model"}, "other/model is no model of the merge"),
            (
                "<new>",
                {"source": {"kind": "model_token", "model": "LEFT", "token": "gub"}},
                "LEFT has no token 'gub'",
            ),
            (
                "<new>",
                {"source": {"kind": "model_token", "model": "LEFT", "token_id": 24}},
                "LEFT has no row 24; it has 24 rows",
            ),
            (
                "<new>",
                {"source": {"kind": "model_token", "model": "other/model", "token": "gub"}},
                "other/model is no model of the merge",
            ),
        ],
    )
    def test_one_that_names_no_embedding_is_refused(
        self, pair: Pair, tmp_path: Path, token: str, override: dict[str, Any], message: str
    ) -> None:
        named = dict(zip(("LEFT", "RIGHT"), map(str, pair.models), strict=True))
        text = json.dumps({token: override})
        for name, path in named.items():
            text, message = text.replace(name, path), message.replace(name, path)
        configuration = pair.dam({"source": "union", "tokens": json.loads(text)})
        with watched_reads() as reads, pytest.raises(ConfigError) as error:
            merge(configuration, tmp_path / "out")
        assert f"tokenizer.tokens[{token!r}]: " in error.value.message
        assert message in error.value.message
        assert not reads.order


class TestTokenizersThatMergekitCannotBring:
    """mergekit would stop in the middle of the merge, or write rows of other tokens."""

    def refused(self, configuration: dict[str, Any], folder: Path) -> str:
        with watched_reads() as reads, pytest.raises(ConfigError) as error:
            merge(configuration, folder / "out")
        assert not reads.order
        return error.value.message

    def test_with_more_tokens_than_rows(self, pair: Pair, tmp_path: Path) -> None:
        right = tmp_path / "right"
        shutil.copytree(pair.models[1], right)
        tokenizer = AutoTokenizer.from_pretrained(right)
        tokenizer.add_tokens(["new" + "x" * index for index in range(7)])
        tokenizer.save_pretrained(right)
        settings = {"tokenizer": {"source": str(right)}}
        message = self.refused(
            dam([pair.models[0], right], pair.texts, settings=settings), tmp_path
        )
        assert f"{right} has 1 tokens ('newxxxxxx') without a row of its embedding" in message

    def test_with_gaps_between_the_ids(self, pair: Pair, tmp_path: Path) -> None:
        shutil.copytree(pair.models[0], tmp_path / "left")
        file = tmp_path / "left" / "tokenizer.json"
        file.write_text(file.read_text("utf-8").replace('"fot": 19', '"fot": 21'), "utf-8")
        models = (tmp_path / "left", pair.models[1])
        settings = {"tokenizer": {"source": "base"}}
        message = self.refused(dam(models, pair.texts, settings=settings), tmp_path)
        assert "without gaps, but the last of 20 tokens has id 21" in message
