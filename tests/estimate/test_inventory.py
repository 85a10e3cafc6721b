"""The inventory of a planned merge, against tiny merges."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache

from mergekit_dam.estimate.inventory import take_inventory
from mergekit_dam.estimate.report import table
from mergekit_dam.estimate.sweeps import sweeps
from tests.kit.adapters import save_adapter
from tests.kit.estimates import ROOM, inventory, planned, planned_estimate
from tests.kit.merging import dam, merge
from tests.kit.models import ARCHITECTURES, Models, save_models
from tests.kit.quantised import packed
from tests.kit.texts import save_calibration


class TestInventory:
    def test_nothing_but_headers_is_read(self, take: Any) -> None:
        with mock.patch.object(LazyTensorLoader, "get_tensor", side_effect=AssertionError):
            found = take()
        assert len(found.blocks) == 2
        assert found.sources == 3

    def test_tensors_and_bytes_are_those_of_the_files(
        self, take: Any, llama_models: Models
    ) -> None:
        found = take()
        folders = [*llama_models.models, llama_models.base]
        files = [folder / "model.safetensors" for folder in folders]
        # Of a file, all but the header.
        sizes = [f.stat().st_size - int.from_bytes(f.read_bytes()[:8], "little") - 8 for f in files]
        assert sum(tensor.stored for tensor in found.tensors) == sum(sizes)
        assert sorted(sum(own) for own in found.files) == sorted(f.stat().st_size for f in files)

    def test_text_is_counted_and_not_read(self, tmp_path: Path, llama_models: Models) -> None:
        text = tmp_path / "empty.jsonl"
        text.touch()
        found = inventory(
            tmp_path, dam(llama_models.models, [text, f"{text}:samples=9"], samples=4)
        )
        assert found.text.sequences == (4, 9)
        assert found.text.held_out == (1, 1)
        assert found.text.tokens == 13 * 16
        assert found.text.first_tokens(2 * 16) == 4 * 16

    def test_another_dtype_makes_copies(
        self, tmp_path: Path, llama_models: Models, take: Any
    ) -> None:
        assert not any(tensor.converted for tensor in take().tensors)
        text = save_calibration(tmp_path)
        settings = {"dtype": "bfloat16", "out_dtype": "float32"}
        found = inventory(tmp_path, dam(llama_models.models, [text] * 2, settings=settings))
        for tensor in found.tensors:
            assert tensor.converted == tensor.loaded == 2 * 2 * tensor.parameters
            assert (tensor.stored, tensor.written) == (8 * tensor.parameters, 4 * tensor.parameters)

    def test_dequantised_weights_are_copies(self, tmp_path: Path, llama_models: Models) -> None:
        text = save_calibration(tmp_path)
        stored = packed(
            llama_models.models[0],
            tmp_path / "int4",
            ignore=("lm_head",),
            num_bits=4,
            strategy="channel",
        )
        found = inventory(tmp_path, dam([stored, llama_models.models[1]], [text] * 2))
        copied = {tensor.name for tensor in found.tensors if tensor.converted}
        assert copied == {tensor.name for tensor in found.tensors if "_proj" in tensor.name}
        for tensor in found.tensors:
            if tensor.name in copied:
                assert tensor.converted == 4 * tensor.parameters
                assert tensor.stored == 4.5 * tensor.parameters

    def test_an_adapter_is_taken_for_its_base(self, tmp_path: Path, llama_models: Models) -> None:
        """Merging it would read weights."""
        text = save_calibration(tmp_path)
        adapter = save_adapter(llama_models.base, tmp_path / "adapter")
        adapted = Path(f"{llama_models.base}+{adapter}")
        models = [adapted, llama_models.models[0]]
        found = inventory(tmp_path, dam(models, [text, text], base=llama_models.base))
        assert found.sources == 3
        assert not any(model.lora for model in LoaderCache.loaders)

    @pytest.mark.parametrize(
        "name", ["llama", "gpt2", "gemma2", "llama-tied", "stablelm", "phi", "olmo2"]
    )
    def test_parts_are_taken_apart_as_the_fit_does(self, tmp_path: Path, name: str) -> None:
        models = save_models(tmp_path, ARCHITECTURES[name](), count=2)
        text = save_calibration(tmp_path / "text.jsonl")
        plan = planned(tmp_path, dam(models.models, [text, text], base=models.base))
        found = take_inventory(plan)
        for size, stage in zip(found.parts, plan.stages, strict=True):
            decoder = stage.models.output
            part = stage.part(decoder)
            weights = {
                plan.name[len(part.prefix) :]: torch.randn(
                    decoder.model.get_parameter(plan.name).shape
                )
                for plan in stage.all_tensors
                if plan.tied_to is None
            }
            like = torch.zeros((1, 2), dtype=torch.long)
            anatomy = part.anatomy(
                weights, like if stage.kind == "input" else torch.zeros(1, 2, 16)
            )
            expected = [[(unit.name, unit.kind) for unit in own] for own in anatomy.groups]
            got = [
                [(unit.name, "linear" if unit.kind == "head" else unit.kind) for unit in own]
                for own in size.groups
            ]
            assert got == expected, stage.label

    def test_a_replay_has_no_parts(
        self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]
    ) -> None:
        merge(dam(llama_models.models, calibration), tmp_path / "first")
        found = inventory(tmp_path, dam(llama_models.models, coefficients=str(tmp_path / "first")))
        assert (found.parts, found.settings) == ((), None)
        (only,) = sweeps(found, ROOM)
        assert only.read == sum(tensor.stored for tensor in found.tensors)
        assert table(planned_estimate(found)).startswith("without a fit: 2 sources")

    def test_slices_that_leave_out_models(
        self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]
    ) -> None:
        """A teacher is read where it is not merged; a stack of copies is merged without a fit."""
        first, second = (
            {"model": str(model), "layer_range": [0, 1], "parameters": {"calibration": str(text)}}
            for model, text in zip(llama_models.models, calibration, strict=True)
        )
        configuration = dam([], settings={"models": None})
        configuration["slices"] = [{"sources": [first]}, {"sources": [first, second]}]
        found = inventory(tmp_path, configuration)
        assert (found.sources, len(found.blocks)) == (2, 2)
        assert planned_estimate(found).sweeps[0].read == sum(t.stored for t in found.tensors)
        configuration["slices"] = [{"sources": [first]}, {"sources": [second]}]
        found = inventory(tmp_path, configuration)
        assert (found.sources, found.parts, found.settings) == (2, (), None)
        assert table(planned_estimate(found)).startswith("without a fit: 2 sources")
