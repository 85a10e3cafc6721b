"""Merges whose result is known: coefficients written by hand, and replayed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam.coefficients.file import FILE_NAME, CoefficientFile
from tests.kit.merging import dam, linear, merge, tensors_of
from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.texts import Calibration


class TestKnownCoefficients:
    """Merges whose result is known: coefficients written by hand, and replayed."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_hot_coefficients_return_the_source_model(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        models = save_models(tmp_path, tiny_llama_config(), count=2, dtype=dtype)
        sources = (*models.models, models.base)
        for index, source in enumerate(sources):
            row = torch.eye(3)[index][:, None]
            out = merge(
                replay_of(models, constant(tensors_of(source), row, sources), tmp_path),
                tmp_path / f"out_{index}",
            )
            assert same(out.tensors, tensors_of(source))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_uniform_coefficients_are_mergekits_linear(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        models = save_models(tmp_path, tiny_llama_config(), count=2, dtype=dtype)
        stock = merge(linear(models.models), tmp_path / "linear")
        row = torch.tensor([0.5, 0.5, 0.0])[:, None]
        saved = constant(stock.tensors, row, (*models.models, models.base))
        ours = merge(replay_of(models, saved, tmp_path), tmp_path / "out")
        assert same(ours.tensors, stock.tensors)

    def test_a_fit_of_nothing_is_mergekits_linear(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        # A ridge beyond all curvature leaves the coefficients at their start.
        configuration = dam(
            llama_models.models,
            calibration,
            each=[{"weight": 3.0}, {"weight": 1.0}],
            ridge=1e12,
            head=False,
        )
        ours = merge(configuration, tmp_path / "ours")
        stock = merge(linear(llama_models.models, [3.0, 1.0]), tmp_path / "linear")
        for name, tensor in stock.tensors.items():
            torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def constant(like: dict[str, Tensor], row: Tensor, sources: Sequence[Path]) -> CoefficientFile:
    """A file with the same coefficients `[sources, 1]`, spread over all columns of a tensor."""
    return CoefficientFile(
        {name: row.expand(-1, tensor.shape[-1]).clone() for name, tensor in like.items()},
        tuple(map(str, sources)),
        {"axes": {}},
    )


def replay_of(models: Models, saved: CoefficientFile, folder: Path) -> dict[str, Any]:
    saved.save(folder / FILE_NAME)
    return dam(models.models, base=models.base, coefficients=str(folder / FILE_NAME))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )
