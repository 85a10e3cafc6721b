"""A replay of saved coefficients gives back the merge."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_dam.coefficients.correction import Correction, Corrections
from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME, CoefficientFile
from mergekit_dam.coefficients.merge import merge_weights
from tests.kit.merging import Merged, dam, merge, refused, rows, sliced_dam, tensors_of
from tests.kit.models import MLP, Models, model_with_new_words, save_models, tiny_llama_config
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
        assert not [r for r in caplog.records if r.name.startswith("mergekit_dam.host")]

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


class TestChangedModels:
    """A replay with models that are not those of the merge."""

    @pytest.fixture
    def trained(self, llama_models: Models, tmp_path: Path) -> Models:
        """The same models, of which one was trained in place."""
        root = shutil.copytree(llama_models.base.parent, tmp_path / "trained")
        models = Models(root / "base", tuple(root / model.name for model in llama_models.models))
        tensors = tensors_of(models.models[1])
        tensors[MLP] *= 1.5
        save_file(tensors, models.models[1] / "model.safetensors", metadata={"format": "pt"})
        return models

    def test_are_refused_with_the_model_and_the_file(
        self, merged: Merged, trained: Models, tmp_path: Path
    ) -> None:
        configuration = dam(trained.models, base=trained.base, coefficients=str(merged.path))
        refused(
            configuration,
            tmp_path / "out",
            "coefficients: model_1: model.safetensors has other weights (sha256 ",
            "`changed_models: allow`",
        )

    def test_are_merged_with_the_coefficients_of_their_name_where_that_is_allowed(
        self,
        merged: Merged,
        trained: Models,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        configuration = dam(
            trained.models[::-1],
            base=trained.base,
            coefficients=str(merged.path),
            changed_models="allow",
        )
        again = merge(configuration, tmp_path / "out")
        assert again.coefficients.sources == merged.coefficients.sources
        sources = [tensors_of(folder) for folder in (*trained.models, trained.base)]
        expected = merge_weights([own[MLP] for own in sources], rows(merged, MLP))
        assert torch.equal(again.tensors[MLP], expected)
        assert not torch.equal(again.tensors[MLP], merged.tensors[MLP])
        assert "model_1: model.safetensors has other weights" in caplog.text

    def test_under_other_names_are_refused(
        self, merged: Merged, trained: Models, tmp_path: Path
    ) -> None:
        other = trained.models[1].rename(tmp_path / "other")
        configuration = dam(
            [other, trained.models[0]], base=trained.base, coefficients=str(merged.path)
        )
        refused(configuration, tmp_path / "out", "other has neither the weights nor the name")

    def test_a_search_may_start_from_coefficients_of_models_that_were_trained_since(
        self,
        merged: Merged,
        trained: Models,
        calibration: Calibration,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        configuration = dam(
            trained.models,
            calibration,
            base=trained.base,
            objective="logits",
            start=str(merged.path),
            steps=1,
        )
        merge(configuration, tmp_path / "out")
        assert "start: model_1: model.safetensors has other weights" in caplog.text

    def test_without_coefficients_the_parameter_is_refused(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration, changed_models="allow")
        refused(configuration, tmp_path / "out", "`changed_models` is for a replay")


@pytest.fixture(scope="module")
def corrected(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Merged:
    out = tmp_path_factory.mktemp("corrected") / "out"
    return merge(dam(llama_models.models, calibration, correction="full"), out)


class TestCorrections:
    @pytest.fixture
    def copied(self, corrected: Merged, tmp_path: Path) -> Merged:
        return Merged(shutil.copytree(corrected.path, tmp_path / "copied"))

    def test_whose_values_were_changed_are_refused(
        self, copied: Merged, llama_models: Models, tmp_path: Path
    ) -> None:
        file = copied.path / CORRECTIONS_NAME
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        configuration = dam(llama_models.models, coefficients=str(copied.path))
        refused(configuration, tmp_path / "out", "values were changed or are damaged")

    def test_of_another_shape_are_refused_by_the_name_of_the_tensor(
        self, copied: Merged, llama_models: Models, tmp_path: Path
    ) -> None:
        file = copied.coefficients
        corrections = Corrections(tmp_path / "parts")
        corrections.put(MLP, Correction(full=torch.ones(3, 5)))
        digest = corrections.save(copied.path / CORRECTIONS_NAME)
        CoefficientFile(
            file.coefficients, file.sources, {**file.metadata, "corrections": digest}
        ).save(copied.path / FILE_NAME)
        configuration = dam(llama_models.models, coefficients=str(copied.path))
        refused(
            configuration,
            tmp_path / "out",
            f"a wrong correction for {MLP}: required a correction of shape [24, 16], got [3, 5]",
        )
