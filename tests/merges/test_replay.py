"""A replay of saved coefficients gives back the merge."""

import shutil
from pathlib import Path

import pytest
import torch

from mergekit_dam.coefficients.file import FILE_NAME
from tests.kit.merging import Merged, dam, merge, refused, sliced_dam
from tests.kit.models import Models, model_with_new_words, save_models, tiny_llama_config
from tests.kit.texts import Calibration


class TestReplay:
    @pytest.mark.parametrize("path", ["", FILE_NAME])
    def test_gives_the_same_bytes_without_calibration(
        self, merged: Merged, llama_models: Models, tmp_path: Path, path: str
    ) -> None:
        configuration = dam(
            llama_models.models,
            ["gone.jsonl", "gone.jsonl"],
            base=llama_models.base,
            coefficients=str(merged.path / path),
        )
        again = merge(configuration, tmp_path / "out")
        assert again.model_bytes == merged.model_bytes
        assert again.coefficient_bytes == merged.coefficient_bytes
        assert again.report["replayed"]
        assert again.report["versions"] == merged.report["versions"]
        assert {entry["outcome"] for entry in again.entries.values()} == {"replayed"}
        again.load()

    def test_finds_models_by_name_in_another_order(
        self, merged: Merged, llama_models: Models, tmp_path: Path
    ) -> None:
        configuration = dam(
            llama_models.models[::-1], base=llama_models.base, coefficients=str(merged.path)
        )
        again = merge(configuration, tmp_path / "out")
        assert again.model_bytes == merged.model_bytes
        assert again.coefficient_bytes == merged.coefficient_bytes

    def test_finds_moved_models_by_their_weights_in_another_order(
        self,
        merged: Merged,
        llama_models: Models,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        moved = shutil.copytree(llama_models.models[0], tmp_path / "moved")
        configuration = dam(
            [llama_models.models[1], moved],
            base=llama_models.base,
            coefficients=str(merged.path),
        )
        again = merge(configuration, tmp_path / "out")
        assert again.model_bytes == merged.model_bytes
        assert again.coefficients.sources == ("moved", "model_1", "base")
        assert not [r for r in caplog.records if r.name.startswith("mergekit_dam")]

    def test_can_be_replayed_itself(
        self, merged: Merged, llama_models: Models, tmp_path: Path
    ) -> None:
        source = merged.path
        for name in ("first", "second"):
            configuration = dam(
                llama_models.models, base=llama_models.base, coefficients=str(source)
            )
            source = merge(configuration, tmp_path / name).path
        assert Merged(source).model_bytes == merged.model_bytes

    def test_of_another_number_of_models_is_refused(
        self, merged: Merged, llama_models: Models, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, coefficients=str(merged.path))
        refused(configuration, tmp_path / "out", "made from 3 models", "got 2")

    def test_of_models_of_another_width_is_refused(self, merged: Merged, tmp_path: Path) -> None:
        config = tiny_llama_config(hidden_size=32)
        wide = save_models(tmp_path, config, count=2)
        configuration = dam(
            wide.models, base=wide.base, coefficients=str(merged.path), changed_models="allow"
        )
        refused(configuration, tmp_path / "out", "model.embed_tokens.weight", "32", "16")

    def test_of_more_layers_is_refused(self, merged: Merged, tmp_path: Path) -> None:
        deep = save_models(tmp_path, tiny_llama_config(num_hidden_layers=3), count=2)
        configuration = dam(
            deep.models, base=deep.base, coefficients=str(merged.path), changed_models="allow"
        )
        refused(configuration, tmp_path / "out", "has none for model.layers.2.")


class TestReplayOf:
    """A replay of merges that are more than a list of models."""

    def test_aligned_vocabularies(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        other, text = model_with_new_words(tmp_path)
        models, settings = [llama_models.models[0], other], {"tokenizer": {"source": "union"}}
        first = merge(dam(models, [calibration[0], text], settings=settings), tmp_path / "first")
        again = merge(
            dam(models, settings=settings, coefficients=str(first.path)), tmp_path / "again"
        )
        assert again.model_bytes == first.model_bytes

    def test_slices(self, llama_models: Models, calibration: Calibration, tmp_path: Path) -> None:
        ranges = [(0, 2), (1, 2)]
        first = merge(sliced_dam(llama_models.models, calibration, ranges), tmp_path / "first")
        configuration = sliced_dam(
            llama_models.models, calibration, ranges, coefficients=str(first.path)
        )
        configuration["slices"][1]["sources"].reverse()
        assert merge(configuration, tmp_path / "again").model_bytes == first.model_bytes

    @pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"out_dtype": "float16"}], ids=str)
    def test_other_dtypes(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        settings: dict[str, str],
    ) -> None:
        models = llama_models.models
        first = merge(dam(models, calibration, settings=settings, head=False), tmp_path / "first")
        again = merge(
            dam(models, settings=settings, coefficients=str(first.path)), tmp_path / "again"
        )
        assert again.model_bytes == first.model_bytes
        assert {t.dtype for t in again.tensors.values()} <= {torch.bfloat16, torch.float16}
