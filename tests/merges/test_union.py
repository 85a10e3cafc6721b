"""Merges by the union of two vocabularies."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.kit.merging import Merged, merge, tensors_of
from tests.kit.models import EMBEDDING, HEAD, loaded, logits_of
from tests.kit.processes import difference, finish, start_merges
from tests.kit.texts import calibration_tokens
from tests.kit.vocabularies import (
    LEFT,
    LEFT_VOCABULARY,
    RIGHT,
    RIGHT_VOCABULARY,
    SHARED,
    Pair,
    ids_of,
    lines_of,
    one_hot,
    own_columns,
    save_pair,
)


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

    @pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gemma2", "phi"])
    def test_one_hot_coefficients_are_a_model_on_its_own_tokens(
        self, tmp_path: Path, architecture: str
    ) -> None:
        """Positions, scales, soft caps and the biases of a head too."""
        pair = save_pair(tmp_path, architecture)
        fitted = merge(pair.dam(), tmp_path / "fitted")
        fitted.load()
        for source, (model, text) in enumerate(zip(pair.models, pair.texts, strict=True)):
            coefficients = str(one_hot(fitted, source, tmp_path / f"coefficients {source}"))
            merged = merge(pair.dam(coefficients=coefficients), tmp_path / f"out {source}")
            own, new = (ids_of(path, lines_of(text)) for path in (model, merged.path))
            columns = own_columns(model, merged.path)
            assert torch.equal(columns[own], new)
            expected = logits_of(loaded(model), own)[..., : len(columns)]
            torch.testing.assert_close(logits_of(loaded(merged.path), new)[..., columns], expected)

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
        tokens = calibration_tokens(
            pair.texts[source], AutoTokenizer.from_pretrained(only.path), samples=4, vocab_size=28
        )
        known = own_columns(pair.models[source], only.path)
        of_all = logits_of(loaded(only.path), tokens).double()
        missing = of_all.logsumexp(-1) - of_all[..., known].logsumexp(-1)
        assert found == pytest.approx(float(missing.mean()), rel=1e-5)
        assert found > 1e-3


@pytest.mark.slow
def test_two_processes_have_one_vocabulary(pair: Pair, union: Merged, tmp_path: Path) -> None:
    finish(start_merges({"union": pair.dam()}, tmp_path))
    two = Merged(tmp_path / "union")
    assert difference(two, union) < 1e-5
    torch.testing.assert_close(two.tensors, union.tensors, atol=1e-5, rtol=1e-4)
    assert (two.path / "tokenizer.json").read_bytes() == (
        union.path / "tokenizer.json"
    ).read_bytes()
