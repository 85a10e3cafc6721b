"""The fit of embeddings on made-up data whose answer is known."""

from collections.abc import Sequence

import pytest
import torch

from mergekit_dam.fitting import embedding as embedding_module
from mergekit_dam.fitting.embedding import Usage, fit_embedding
from tests.kit.fits import MODELS, sources_of
from tests.kit.tensors import randn


def usage(source: int, rows: Sequence[int], size: int = 20) -> Usage:
    counts = torch.bincount(torch.tensor(rows), minlength=size).double()
    return Usage(source, counts, counts)


def test_rows_that_one_models_data_uses_give_that_models_embedding() -> None:
    tensors = list(randn(MODELS, 20, 6))
    fitted = fit_embedding(sources_of(tensors), [usage(2, [1, 1, 5, 7, 8, 9, 11])])
    expected = torch.tensor([[0.0], [0.0], [1.0]]).expand(-1, 6)
    torch.testing.assert_close(fitted.coefficients, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(fitted.merged, tensors[2], rtol=0, atol=1e-2)
    assert fitted.report.loss_fitted is not None
    assert fitted.report.loss_fitted < 1e-6


@pytest.mark.parametrize("rows_at_a_time", [4096, 3])
def test_an_embedding_is_the_weighted_least_squares_of_every_dimension(
    rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_module, "ROWS", rows_at_a_time)
    tensors = list(randn(MODELS, 20, 6))
    used = {0: [0, 1, 2, 2, 2, 3, 9], 2: [2, 10, 11, 12, 12, 13, 14, 15]}
    loss_weights = (1.0, 1.0, 3.0)
    source = sources_of(tensors, form="free", loss_weights=loss_weights)
    fitted = fit_embedding(source, [usage(k, rows) for k, rows in used.items()])
    for dimension in range(6):
        design, target = [], []
        for k, rows in used.items():
            factor = (loss_weights[k] / tensors[k][rows].square().sum()).sqrt()
            design.append(factor * torch.stack([t[rows, dimension] for t in tensors], 1))
            target.append(factor * tensors[k][rows, dimension])
        expected = torch.linalg.lstsq(
            torch.cat(design).double(), torch.cat(target).double()[:, None], driver="gelsd"
        ).solution
        found = fitted.coefficients[:, dimension, None].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_embeddings_losses_are_fractions_of_the_rows_energy() -> None:
    tensors = list(randn(MODELS, 20, 6))
    used = {0: [0, 1, 2, 2, 2, 3], 2: [2, 10, 11, 12, 12]}
    source = sources_of(tensors, loss_weights=(1.0, 1.0, 3.0), ridge=1e-2)
    held = torch.zeros(20, dtype=torch.float64)
    held[[4, 5]] = 1
    uses = [Usage(k, usage(k, rows).fit, held) for k, rows in used.items()]
    fitted = fit_embedding(source, uses)
    assert fitted.report.outcome == "fitted"
    for rows_of, reported in (
        (used, fitted.report.loss_fitted),
        ({0: [4, 5], 2: [4, 5]}, fitted.report.held_out_fitted),
    ):
        direct = 0.0
        for k, weight in ((0, 1.0), (2, 3.0)):
            rows = rows_of[k]
            error = (fitted.merged[rows] - tensors[k][rows]).square().sum()
            direct += weight / 4 * float(error / tensors[k][rows].square().sum())
        assert reported == pytest.approx(direct, rel=1e-5)


def test_an_embedding_with_one_coefficient_a_model_ties_its_dimensions() -> None:
    tensors = list(randn(MODELS, 20, 6))
    source = sources_of(tensors, form="free", granularity="tensor")
    rows = [0, 1, 2, 2, 3]
    fitted = fit_embedding(source, [usage(0, rows)])
    assert fitted.coefficients.shape == (MODELS, 1)
    torch.testing.assert_close(
        fitted.coefficients[:, 0], torch.tensor([1.0, 0.0, 0.0]), atol=1e-4, rtol=0
    )
