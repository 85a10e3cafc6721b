"""One vocabulary in embeddings of different numbers of rows."""

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_dam.estimate.inventory import take_inventory
from mergekit_dam.estimate.merge import plan_merge
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import EMBEDDING, HEAD, make_model, tiny_llama_config
from tests.kit.texts import save_text
from tests.kit.tokenizers import WORDS, make_tokenizer
from tests.kit.vocabularies import Pair


class TestPadding:
    def test_rows_are_padded_to_a_multiple(self, pair: Pair, union: Merged, tmp_path: Path) -> None:
        merged = merge(pair.dam({"source": "union", "pad_to_multiple_of": 16}), tmp_path / "out")
        assert merged.load().config.vocab_size == 32
        for name in (EMBEDDING, HEAD):
            assert merged.tensors[name].shape == (32, 16)
            rows = merged.tensors[name][:28]
            torch.testing.assert_close(
                merged.tensors[name][28:], rows.mean(0).expand(4, -1), atol=1e-5, rtol=1e-4
            )
        # Padding is no token of any teacher's: nothing before the head knows of it.
        for name in union.tensors.keys() - {HEAD}:
            torch.testing.assert_close(merged.tensors[name][:28], union.tensors[name][:28])

    def test_a_vocabulary_that_fits_is_not_padded(self, pair: Pair, tmp_path: Path) -> None:
        merged = merge(pair.dam({"source": "union", "pad_to_multiple_of": 14}), tmp_path / "out")
        assert merged.tensors[EMBEDDING].shape == (28, 16)


class TestSizes:
    """One vocabulary in embeddings of other numbers of rows."""

    @pytest.fixture
    def padded(self, tmp_path: Path) -> tuple[list[Path], list[Path]]:
        """Models of 66 and of 64 rows, and their texts."""
        models = []
        for index, rows in enumerate((66, 64)):
            model = make_model(tiny_llama_config(vocab_size=rows), seed=index)
            model.save_pretrained(tmp_path / str(rows))
            make_tokenizer().save_pretrained(tmp_path / str(rows))
            models.append(tmp_path / str(rows))
        return models, [save_text(tmp_path / f"{n}.jsonl", WORDS, seed=n) for n in (0, 1)]

    def test_rows_of_padding_can_be_cut(
        self, padded: tuple[list[Path], list[Path]], tmp_path: Path
    ) -> None:
        models, texts = padded
        merged = merge(dam(models, texts), tmp_path / "out", unsafe_truncate_embeddings=True)
        assert merged.load().config.vocab_size == 64
        assert merged.tensors[EMBEDDING].shape == merged.tensors[HEAD].shape == (64, 16)
        replay = dam(models, coefficients=str(merged.path))
        replayed = merge(replay, tmp_path / "replayed", unsafe_truncate_embeddings=True)
        assert replayed.model_bytes == merged.model_bytes
        replayed.load()
        file = tmp_path / "dam.yaml"
        file.write_text(yaml.safe_dump(dam(models, texts)), encoding="utf-8")
        LoaderCache.loaders.clear()
        options = MergeOptions(quiet=True, unsafe_truncate_embeddings=True)
        found = take_inventory(plan_merge(file, options, tmp_path / "planned"))
        assert {tensor.name: tensor.parameters for tensor in found.tensors} == {
            name: tensor.numel() for name, tensor in merged.tensors.items()
        }

    def test_or_be_given_up_for_the_tokens_that_there_are(
        self, padded: tuple[list[Path], list[Path]], tmp_path: Path
    ) -> None:
        models, texts = padded
        merged = merge(
            dam(models, texts, settings={"tokenizer": {"source": "base"}}), tmp_path / "out"
        )
        assert merged.load().config.vocab_size == len(make_tokenizer())
