"""Merges of models that are listed in every way that mergekit knows."""

import copy
import json
from pathlib import Path

import pytest
import torch

from mergekit_dam.errors import ConfigError
from tests.kit.families import Family
from tests.kit.merging import dam, linear, merge, tensors_of
from tests.kit.models import save_models, tiny_llama_config
from tests.kit.reads import watched_reads
from tests.kit.texts import save_calibration


class TestModels:
    def test_the_base_may_be_listed_or_not(self, family: Family, tmp_path: Path) -> None:
        base = str(family.models.base)
        unlisted = dam(family.models.models[:2], family.texts, base=family.models.base)
        plain = merge(unlisted, tmp_path / "plain")
        for place in (0, 1, 2):
            listed = copy.deepcopy(unlisted)
            listed["models"].insert(place, {"model": base})
            merged = merge(listed, tmp_path / str(place))
            assert merged.coefficients.sources[place] == family.models.base.name
            for name, tensor in merged.tensors.items():
                torch.testing.assert_close(tensor, plain.tensors[name], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_any_number_of_models(self, tmp_path: Path, count: int) -> None:
        models = save_models(tmp_path, tiny_llama_config(num_hidden_layers=1), count=count)
        texts = [save_calibration(tmp_path, seed=k, offset=8 * k) for k in range(count)]
        merged = merge(dam(models.models, texts), tmp_path / "out")
        assert len(merged.coefficients.sources) == count
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}
        merged.load()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_one_model_is_copied_in_any_dtype(
        self, family: Family, tmp_path: Path, dtype: str
    ) -> None:
        configuration = {
            "merge_method": "dam",
            "models": [{"model": str(family[0])}],
            "dtype": dtype,
        }
        with watched_reads() as reads:
            merged = merge(configuration, tmp_path / "out")
        own = tensors_of(family[0])
        assert len(reads.order) == len(own)
        assert all(
            torch.equal(tensor, own[name].to(getattr(torch, dtype)))
            for name, tensor in merged.tensors.items()
        )
        again = merge(
            {**configuration, "parameters": {"coefficients": str(merged.path)}}, tmp_path / "again"
        )
        assert again.model_bytes == merged.model_bytes

    def test_the_same_model_by_two_names_is_copied(self, family: Family, tmp_path: Path) -> None:
        other = tmp_path / "link"
        other.symlink_to(family[0])
        merged = merge(dam([family[0], other], family.texts), tmp_path / "out")
        own = tensors_of(family[0])
        assert all(torch.equal(tensor, own[name]) for name, tensor in merged.tensors.items())
        stock = merge(linear([family[0], other]), tmp_path / "stock")
        assert all(torch.equal(tensor, stock.tensors[n]) for n, tensor in merged.tensors.items())

    def test_the_same_model_by_one_name_is_refused_by_every_method(
        self, family: Family, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="is listed 2 times; list it once"):
            merge(dam([family[0], family[0]], family.texts), tmp_path / "out")
        with pytest.raises(ValueError, match="Duplicate merge inputs"):
            merge(linear([family[0], family[0]]), tmp_path / "out")

    def test_the_same_model_by_two_names_beside_another(
        self, family: Family, tmp_path: Path
    ) -> None:
        other = tmp_path / "link"
        other.symlink_to(family[0])
        merged = merge(dam([family[0], other, family[1]], family.texts), tmp_path / "out")
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}
        assert all(tensor.isfinite().all() for tensor in merged.tensors.values())

    def test_dtypes_are_mergekits(self, family: Family, tmp_path: Path) -> None:
        settings = {"dtype": "float16", "out_dtype": "bfloat16"}
        merged = merge(
            dam(family.models.models[:2], family.texts, settings=settings), tmp_path / "out"
        )
        assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}
        assert json.loads((merged.path / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"
