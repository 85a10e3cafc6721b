"""Merges by the vocabulary of the base, or of one model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mergekit_dam.errors import CalibrationError
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import loaded, logits_of
from tests.kit.vocabularies import SHARED, Pair, ids_of, lines_of, one_hot


class TestSources:
    @pytest.mark.parametrize("source", ["base", "left", "right"])
    def test_the_vocabulary_is_one_models(self, pair: Pair, tmp_path: Path, source: str) -> None:
        """With text in words that both know, one model's ids are for both."""
        chosen = pair.models[source == "right"]
        configuration = dam(
            pair.models,
            [pair.shared, pair.shared],
            settings={"tokenizer": {"source": source if source == "base" else str(chosen)}},
        )
        merged = merge(configuration, tmp_path / "out")
        vocabulary = AutoTokenizer.from_pretrained(chosen).get_vocab()
        tokenizer = AutoTokenizer.from_pretrained(merged.path)
        assert tokenizer.get_vocab() == vocabulary
        whole = merged.load()
        assert whole.config.vocab_size == len(vocabulary) == 20
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
            expected = getattr(tokenizer, special)
            assert getattr(whole.config, special) == expected
            assert getattr(whole.generation_config, special) == expected
        for index, model in enumerate(pair.models):
            coefficients = str(one_hot(merged, index, tmp_path / f"coefficients {index}"))
            configuration["parameters"]["coefficients"] = coefficients
            only = merge(configuration, tmp_path / f"only {index}")
            lines = lines_of(pair.shared)
            own, new = ids_of(model, lines), ids_of(only.path, lines)
            words = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(list(SHARED))
            there = [vocabulary[word] for word in SHARED]
            found = logits_of(loaded(only.path), new)[..., there]
            torch.testing.assert_close(found, logits_of(loaded(model), own)[..., words])

    @pytest.mark.parametrize("source", [0, 1])
    def test_text_in_words_that_it_lacks_is_refused(
        self, pair: Pair, tmp_path: Path, source: int
    ) -> None:
        configuration = pair.dam({"source": str(pair.models[source])})
        with pytest.raises(CalibrationError) as error:
            merge(configuration, tmp_path / "out")
        message = error.value.message
        count = 8 if source == 0 else 5
        assert f"calibration of {pair.models[1 - source]}: its text has {count} tokens" in message
        assert f"as it gets the tokenizer of {pair.models[source]}; write `token" in message

    def test_the_older_way_to_write_it(self, pair: Pair, union: Merged, tmp_path: Path) -> None:
        configuration = dam(pair.models, pair.texts, settings={"tokenizer_source": "union"})
        assert merge(configuration, tmp_path / "out").model_bytes == union.model_bytes

    def test_without_the_section_it_is_refused_with_the_remedy(
        self, pair: Pair, tmp_path: Path
    ) -> None:
        with pytest.raises(CalibrationError, match=r"disagree[^§]*`tokenizer: {source: union}`"):
            merge(dam(pair.models, pair.texts), tmp_path / "out")
        assert not (tmp_path / "out").exists()
