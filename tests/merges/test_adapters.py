"""Merges of LoRA adapters, against peft's own results."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.kit.adapters import save_adapter
from tests.kit.families import LAYERS, Family
from tests.kit.merging import dam, merge, tensors_of
from tests.kit.models import EMBEDDING, VOCAB_SIZE, loaded
from tests.kit.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def adapters(family: Family, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    first = save_adapter(family.models.base, folder / "a", ("q_proj", "down_proj"), seed=0)
    second = save_adapter(family.models.base, folder / "b", ("v_proj", "up_proj"), seed=1)
    for adapter in (first, second):
        make_tokenizer().save_pretrained(adapter)
    return first, second


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
class TestAdapters:
    """Adapters on some projections of the base, with values that are told by peft itself."""

    def test_an_adapter_alone_is_what_peft_makes_of_it(
        self, family: Family, adapters: tuple[Path, Path], tmp_path: Path
    ) -> None:
        peft = pytest.importorskip("peft")
        reference = f"{family.models.base}+{adapters[0]}"
        configuration = {"merge_method": "dam", "models": [{"model": reference}]}
        merged = merge(configuration, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
        model = peft.PeftModel.from_pretrained(loaded(family.models.base), adapters[0])
        expected = model.merge_and_unload().state_dict()
        assert merged.tensors.keys() == expected.keys()
        for name, tensor in merged.tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        base = tensors_of(family.models.base)
        moved = {n.split(".")[-2] for n, t in merged.tensors.items() if not torch.equal(t, base[n])}
        assert moved == {"q_proj", "down_proj"}

    def test_two_adapters_of_one_base_are_merged(
        self, family: Family, adapters: tuple[Path, Path], tmp_path: Path
    ) -> None:
        references = [Path(f"{family.models.base}+{adapter}") for adapter in adapters]
        configuration = dam(references, family.texts, base=family.models.base)
        merged = merge(configuration, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
        fitted = {n for n, entry in merged.entries.items() if entry["outcome"] == "fitted"}
        assert {name.split(".")[-2] for name in fitted} <= {
            *("q_proj", "down_proj", "v_proj", "up_proj")
        }
        assert fitted
        same = [e for e in merged.entries.values() if e["outcome"] == "identical in all models"]
        assert len(same) == len(merged.tensors) - 4 * LAYERS
        for name in (entry["name"] for entry in same):
            assert torch.equal(merged.tensors[name], tensors_of(family.models.base)[name])

    def test_no_cache_is_needed_and_nothing_is_left_behind(
        self, family: Family, adapters: tuple[Path, Path], tmp_path: Path
    ) -> None:
        reference = f"{family.models.base}+{adapters[0]}"
        configuration = {"merge_method": "dam", "models": [{"model": reference}]}
        merged = merge(configuration, tmp_path / "out")
        cached = merge(configuration, tmp_path / "other", lora_merge_cache=str(tmp_path / "cache"))
        assert merged.model_bytes == cached.model_bytes
        assert {entry.name for entry in merged.path.iterdir()} == {
            entry.name for entry in cached.path.iterdir()
        }

    def test_the_folder_of_an_adapter_is_enough(
        self, family: Family, adapters: tuple[Path, Path], tmp_path: Path
    ) -> None:
        written = [
            merge({"merge_method": "dam", "models": [{"model": model}]}, tmp_path / f"out{number}")
            for number, model in enumerate(
                [str(adapters[0]), f"{family.models.base}+{adapters[0]}"]
            )
        ]
        assert written[0].model_bytes == written[1].model_bytes

    def test_an_adapter_that_was_trained_again_is_merged_again(
        self, family: Family, tmp_path: Path
    ) -> None:
        adapter = tmp_path / "adapter"
        configuration = {"merge_method": "dam", "models": [{"model": str(adapter)}]}
        cache = str(tmp_path / "cache")
        written: list[bytes] = []
        for seed in (0, 1, 0):
            save_adapter(family.models.base, adapter, seed=seed)
            make_tokenizer().save_pretrained(adapter)
            out = tmp_path / f"out{len(written)}"
            written.append(merge(configuration, out, lora_merge_cache=cache).model_bytes)
        assert written[0] != written[1]
        assert written[0] == written[2]

    def test_a_cache_that_a_killed_run_left_half_written_heals(
        self, family: Family, adapters: tuple[Path, Path], tmp_path: Path
    ) -> None:
        configuration = {"merge_method": "dam", "models": [{"model": str(adapters[0])}]}
        cache = tmp_path / "cache"
        whole = merge(configuration, tmp_path / "out", lora_merge_cache=str(cache))
        (kept,) = (entry for entry in cache.iterdir() if not entry.name.startswith("."))
        partial = kept.rename(cache / f".{kept.name}.partial")
        (partial / "model.safetensors").write_bytes(b"half")
        again = merge(configuration, tmp_path / "again", lora_merge_cache=str(cache))
        assert again.model_bytes == whole.model_bytes
        assert not partial.exists()

    def test_tokens_that_an_adapter_adds_are_merged_with_its_tokenizer(
        self, family: Family, tmp_path: Path
    ) -> None:
        tokenizer, rows = make_tokenizer(), VOCAB_SIZE + 2
        tokenizer.add_tokens([f"<{token}>" for token in range(len(tokenizer), rows)])
        adapter = save_adapter(family.models.base, tmp_path / "adapter", rows=rows)
        tokenizer.save_pretrained(adapter)
        text = tmp_path / "text.txt"
        text.write_text(f"<{rows - 1}> one two " * 100, "utf-8")
        configuration = dam(
            [adapter, family[0]],
            [text, family.texts[0]],
            base=family.models.base,
            settings={"tokenizer": {"source": "union"}},
        )
        merged = merge(configuration, tmp_path / "out")
        ids = AutoTokenizer.from_pretrained(merged.path).get_vocab()
        assert ids.keys() == tokenizer.get_vocab().keys()
        assert len(merged.tensors[EMBEDDING]) == rows
