"""Merges of LoRA adapters, against peft's own results."""

import warnings
from pathlib import Path

import pytest
import torch

from tests.kit.adapters import save_adapter
from tests.kit.families import LAYERS, Family
from tests.kit.merging import dam, merge, tensors_of
from tests.kit.models import loaded
from tests.kit.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def adapters(family: Family, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's
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
