"""Tensors in memory, merged with coefficients that are known, through mergekit's own functions."""

import json
import logging
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mergekit.merge_methods import PerGroupValues, merge_state_dicts, merge_tensors
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from safetensors.torch import load_file

from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.errors import DamError
from tests.kit.merging import Merged, dam, merge, tensors_of
from tests.kit.models import ARCHITECTURES, Models, save_models
from tests.kit.texts import save_calibration

A = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
B = torch.tensor([[0.5, 0.0, -1.0], [8.0, 1.0, 2.0]])
COLUMNS = torch.tensor([[0.25, 1.0, 0.0], [0.75, 0.0, 2.0]])


class TestTensors:
    def test_one_coefficient_a_column(self) -> None:
        merged = merge_tensors([A, B], "dam", parameters={"coefficients": COLUMNS})
        assert torch.equal(merged, A * COLUMNS[0] + B * COLUMNS[1])

    def test_one_coefficient_a_tensor(self) -> None:
        given = torch.tensor([[0.25], [0.5]])
        merged = merge_tensors([A, B], "dam", parameters={"coefficients": given})
        assert torch.equal(merged, 0.25 * A + 0.5 * B)

    def test_one_hot_coefficients_give_back_a_tensor(self) -> None:
        noise = torch.full_like(A, torch.nan)
        given = torch.tensor([[0.0], [1.0]])
        assert torch.equal(merge_tensors([noise, B], "dam", parameters={"coefficients": given}), B)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_sums_are_fp32_and_the_result_of_the_inputs_dtype(self, dtype: torch.dtype) -> None:
        tensors = [A.to(dtype), B.to(dtype)]
        merged = merge_tensors(tensors, "dam", parameters={"coefficients": COLUMNS})
        assert torch.equal(merged, merge_weights(tensors, COLUMNS).to(dtype))
        wide = merge_tensors(
            tensors, "dam", parameters={"coefficients": COLUMNS}, dtype=torch.float32
        )
        assert torch.equal(wide, merge_weights(tensors, COLUMNS))

    def test_weights_alone_give_the_average(self) -> None:
        merged = merge_tensors([A, B], "dam", parameters={"weight": [3.0, 1.0]})
        torch.testing.assert_close(merged, 0.75 * A + 0.25 * B)
        base = merge_tensors([A, B, A + B], "dam", parameters={"weight": 1.0}, base_index=2)
        torch.testing.assert_close(base, (A + B) / 2)

    def test_coefficients_of_every_expert(self) -> None:
        experts = [torch.stack([A, B]), torch.stack([B, A])]
        given = torch.cat([COLUMNS, COLUMNS.flip(0)], dim=1)
        merged = merge_tensors(experts, "dam", parameters={"coefficients": given})
        assert torch.equal(merged[0], merge_weights([A, B], COLUMNS))
        assert torch.equal(merged[1], merge_weights([B, A], COLUMNS.flip(0)))

    def test_coefficients_by_name(self) -> None:
        given = {"w": COLUMNS, "v": COLUMNS[:, :1]}
        for name, expected in (("w", COLUMNS), ("v", COLUMNS[:, :1])):
            merged = merge_tensors([A, B], "dam", parameters={"coefficients": given}, name=name)
            assert torch.equal(merged, merge_weights([A, B], expected))

    @pytest.mark.parametrize(
        ("parameters", "reason"),
        [
            ({}, "pass `coefficients`: the path"),
            ({"coefficients": None}, "pass `coefficients`: the path"),
            ({"coefficients": COLUMNS[:1]}, r"of shape \[2, 1\] or \[2, 3\], a row for each"),
            (
                {"coefficients": COLUMNS[:, :2]},
                "w: required 3 coefficients per source, or",
            ),
            ({"coefficients": {"v": COLUMNS}}, r"coefficients for the tensor 'w', got .* \(v\)"),
            ({"coefficients": COLUMNS, "ridge": 1.0}, "ridge would not be read"),
            ({"coefficients": COLUMNS, "weight": 1.0}, "weight would not be read"),
            ({"calibration": "a.txt"}, "calibration would not be read"),
            ({"weight": 0.0}, "every tensor has `weight: 0`"),
        ],
        ids=str,
    )
    def test_tensors_that_cannot_be_merged_are_refused(
        self, parameters: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(DamError, match=reason):
            merge_tensors([A, B], "dam", parameters=parameters, name="w")

    def test_gradients_reach_the_tensors(self) -> None:
        a = A.clone().requires_grad_(True)
        merge_tensors([a, B], "dam", parameters={"coefficients": COLUMNS}).sum().backward()
        assert a.grad is not None
        assert torch.equal(a.grad, COLUMNS[0].expand(2, 3))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def merged(request, tmp_path_factory) -> tuple[Models, Merged]:
    """A fitted merge; GPT-2 stores weights transposed, so that its file names axes."""
    folder = tmp_path_factory.mktemp(request.param)
    models = save_models(folder, ARCHITECTURES[request.param](), count=2)
    texts = [save_calibration(folder, seed=k, offset=24 * k) for k in (0, 1)]
    return models, merge(dam(models.models, texts, base=models.base), folder / "out")


class TestStateDicts:
    def test_a_file_gives_the_bytes_of_its_merge(self, merged: tuple[Models, Merged]) -> None:
        models, result = merged
        named: dict[Hashable, Any] = {
            str(m): tensors_of(m) for m in (models.base, *models.models)
        }  # in any order
        given = {"coefficients": str(result.path)}
        found = merge_state_dicts(named, "dam", parameters=given, base=str(models.base))
        assert found.keys() == result.tensors.keys()
        assert all(torch.equal(tensor, result.tensors[n]) for n, tensor in found.items())

    def test_without_names_the_order_is_that_of_the_file(
        self, merged: tuple[Models, Merged], caplog: pytest.LogCaptureFixture
    ) -> None:
        models, result = merged
        dicts = [tensors_of(folder) for folder in (*models.models, models.base)]
        given = {"coefficients": CoefficientFile.load(result.path)}
        with caplog.at_level(logging.WARNING):
            found = merge_state_dicts(dicts, "dam", parameters=given)
        assert all(torch.equal(tensor, result.tensors[n]) for n, tensor in found.items())
        assert not caplog.records

    def test_other_names_are_reported_once(
        self, merged: tuple[Models, Merged], caplog: pytest.LogCaptureFixture
    ) -> None:
        models, result = merged
        folders = (*models.models, models.base)
        named: dict[Hashable, Any] = {
            f"model {i}": tensors_of(folder) for i, folder in enumerate(folders)
        }
        with caplog.at_level(logging.WARNING):
            merge_state_dicts(named, "dam", parameters={"coefficients": str(result.path)})
        assert len(caplog.records) == len(folders)
        assert "model 2 has neither the weights nor the name of a model" in caplog.text

    def test_names_of_which_some_are_known_are_refused(self, merged: tuple[Models, Merged]) -> None:
        models, result = merged
        folders = (models.models[1], models.models[0], models.base)
        named: dict[Hashable, Any] = {str(folder): tensors_of(folder) for folder in folders}
        named["moved"] = named.pop(str(models.models[0]))
        with pytest.raises(DamError, match="of which 1 are unknown; name them as the file does"):
            merge_state_dicts(named, "dam", parameters={"coefficients": str(result.path)})

    def test_values_of_every_group(self) -> None:
        dicts = [{"w": A, "b": A[0], "count": torch.tensor(3)}, {"w": B, "b": B[0]}]
        dicts[1]["count"] = torch.tensor(3)
        given = PerGroupValues([COLUMNS, COLUMNS[:, :1], COLUMNS])
        found = merge_state_dicts(dicts, "dam", parameters={"coefficients": given})
        assert torch.equal(found["w"], merge_weights([A, B], COLUMNS))
        assert torch.equal(found["b"], merge_weights([A[0], B[0]], COLUMNS[:, :1]))
        assert found["count"] == 3  # mergekit copies what is no weight

    def test_a_file_of_another_merge_is_refused(self, merged: tuple[Models, Merged]) -> None:
        given = {"coefficients": str(merged[1].path)}
        with pytest.raises(DamError, match=r"for the tensor 'w', got those of \d+ others"):
            merge_state_dicts([{"w": A}, {"w": B}], "dam", parameters=given)
        with pytest.raises(DamError, match="no file at"):
            merge_state_dicts([{"w": A}, {"w": B}], "dam", parameters={"coefficients": "none"})


class TestRawFiles:
    def test_mergekit_pytorch_replays_a_merge(
        self, merged: tuple[Models, Merged], tmp_path: Path
    ) -> None:
        models, result = merged
        files = [str(model / "model.safetensors") for model in models.models]
        configuration = {
            "merge_method": "dam",
            "models": [{"model": file} for file in files],
            "base_model": str(models.base / "model.safetensors"),
            "parameters": {"coefficients": str(result.path)},
        }
        done = self.run(configuration, tmp_path)
        assert done.exit_code == 0, done.output
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == result.tensors.keys()
        assert all(torch.equal(tensor, result.tensors[n]) for n, tensor in found.items())

    def test_without_coefficients_it_says_where_a_fit_runs(
        self, merged: tuple[Models, Merged], tmp_path: Path
    ) -> None:
        files = [str(model / "model.safetensors") for model in merged[0].models]
        configuration = {"merge_method": "dam", "models": [{"model": file} for file in files]}
        done = self.run(configuration, tmp_path)
        assert done.exit_code == 1
        assert "For a fit, run it through mergekit-yaml" in done.output

    @staticmethod
    def run(configuration: dict[str, Any], folder: Path) -> Any:
        file = folder / "raw.yml"
        file.write_text(json.dumps(configuration), encoding="utf-8")
        return CliRunner().invoke(mergekit_pytorch, [str(file), str(folder / "out")])
