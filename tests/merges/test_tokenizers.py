"""Merges with mergekit's section `tokenizer`, of equal and of extended vocabularies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.kit.merging import dam, merge
from tests.kit.models import EMBEDDING, HEAD, Models, model_with_new_words
from tests.kit.texts import Calibration
from tests.kit.tokenizers import make_tokenizer


class TestTokenizers:
    @pytest.mark.parametrize(
        "settings",
        [
            {"tokenizer": {"source": "base"}},
            {"tokenizer": {"source": "union"}},
            {"tokenizer_source": "union"},
            {"tokenizer": {"source": "base", "pad_to_multiple_of": 32}},
        ],
        ids=str,
    )
    def test_of_equal_vocabularies_are_aligned(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        settings: dict[str, Any],
    ) -> None:
        plain = merge(dam(llama_models.models, calibration, head=False), tmp_path / "plain")
        configuration = dam(llama_models.models, calibration, head=False, settings=settings)
        merged = merge(configuration, tmp_path / "out")
        known = len(make_tokenizer())
        rows_left = 64 if "pad" in str(settings) else known
        assert merged.tensors[EMBEDDING].shape == merged.tensors[HEAD].shape == (rows_left, 16)
        assert merged.load().config.vocab_size == rows_left
        assert len(AutoTokenizer.from_pretrained(merged.path)) == known
        for name in plain.tensors.keys() - {HEAD}:
            torch.testing.assert_close(merged.tensors[name][:known], plain.tensors[name][:known])

    def test_union_takes_the_tokens_that_one_model_has(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        other, text = model_with_new_words(tmp_path)
        configuration = dam(
            [llama_models.models[0], other],
            [calibration[0], text],
            settings={"tokenizer": {"source": "union"}},
        )
        merged = merge(configuration, tmp_path / "out")
        known = len(make_tokenizer()) + 2
        assert merged.tensors[EMBEDDING].shape == (known, 16)
        assert len(AutoTokenizer.from_pretrained(merged.path)) == known
        merged.load()

    def test_without_a_base_the_first_model_gives_its_own(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        other, text = model_with_new_words(tmp_path)
        for index, (models, texts) in enumerate(
            [
                ([llama_models.models[0], other], [calibration[0], calibration[1]]),
                ([other, llama_models.models[0]], [text, calibration[0]]),
            ]
        ):
            merged = merge(dam(models, texts, head=False), tmp_path / str(index))
            assert len(AutoTokenizer.from_pretrained(merged.path)) == len(make_tokenizer()) + (
                2 * index
            )
