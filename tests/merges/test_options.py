"""Options of mergekit that change how a merge runs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_dam.errors import ConfigError
from tests.kit.merging import dam, merge, tensors_of
from tests.kit.models import Models
from tests.kit.texts import Calibration


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"async_write": True, "write_threads": 2},
            {"clone_tensors": True},
            {"low_cpu_memory": True},
            {"read_to_gpu": True},  # to options.device, which is the CPU
        ],
        ids=str,
    )
    def test_change_nothing_in_the_model(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        options: dict[str, Any],
    ) -> None:
        configuration = dam(llama_models.models, calibration, head=False)
        plain = merge(configuration, tmp_path / "plain")
        assert merge(configuration, tmp_path / "out", **options).model_bytes == plain.model_bytes

    def test_many_gpus_are_refused_for_a_fit(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration, head=False)
        with pytest.raises(ConfigError, match=r"--multi-gpu: a fit follows the data"):
            merge(configuration, tmp_path / "out", multi_gpu=True)
        assert not (tmp_path / "out").exists()

    def test_shards_card_and_tokenizer_are_mergekits(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        merged = merge(
            dam(llama_models.models, calibration, head=False),
            tmp_path / "out",
            out_shard_size=4000,
            write_model_card=False,
            copy_tokenizer=False,
        )
        names = {path.name for path in merged.path.iterdir()}
        assert "model.safetensors.index.json" in names
        assert not names & {"README.md", "tokenizer.json"}
        merged.load()

    @pytest.mark.parametrize("lazy_unpickle", [True, False])
    def test_pickled_models_are_read_too(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path, lazy_unpickle: bool
    ) -> None:
        pickled = []
        for model in llama_models.models:
            pickled.append(tmp_path / model.name)
            shutil.copytree(model, pickled[-1], ignore=shutil.ignore_patterns("*.safetensors"))
            torch.save(tensors_of(model), pickled[-1] / "pytorch_model.bin")
        plain = merge(dam(llama_models.models, calibration, head=False), tmp_path / "plain")
        merged = merge(
            dam(pickled, calibration, head=False), tmp_path / "out", lazy_unpickle=lazy_unpickle
        )
        assert merged.model_bytes == plain.model_bytes
