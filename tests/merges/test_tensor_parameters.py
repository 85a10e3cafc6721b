"""Every parameter of a tensor or a model, and its effect on a whole merge."""

from pathlib import Path

import pytest
import torch

from tests.kit.merging import dam, linear, mean, merge, rows
from tests.kit.models import ATTENTION, EMBEDDING, HEAD, MLP, Models
from tests.kit.texts import Calibration


class TestTensorParameters:
    def test_granularity_tensor_gives_one_coefficient_a_model(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration, granularity="tensor")
        merged = merge(configuration, tmp_path / "out")
        assert {r.shape for r in merged.coefficients.coefficients.values()} == {(2, 1)}
        assert merged.entries[MLP]["outcome"] == merged.entries[HEAD]["outcome"] == "fitted"
        merged.load()

    @pytest.mark.parametrize("base", [True, False])
    @pytest.mark.parametrize("sum_to_one", [True, False])
    def test_sum_to_one(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        base: bool,
        sum_to_one: bool,
    ) -> None:
        merged = merge(
            dam(
                llama_models.models,
                calibration,
                base=llama_models.base if base else None,
                sum_to_one=sum_to_one,
                head=False,
            ),
            tmp_path / "out",
        )
        sums = torch.cat([r.sum(0) for r in merged.coefficients.coefficients.values()])
        assert (float((sums - 1).abs().max()) < 1e-5) == sum_to_one
        if base and not sum_to_one:  # the paper's form: the base has no coefficient
            assert all(not r[2].any() for r in merged.coefficients.coefficients.values())

    def test_switches_average_embeddings_norms_and_head(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(
            llama_models.models, calibration, embeddings=False, norms=False, head=False
        )
        merged = merge(configuration, tmp_path / "out")
        stock = merge(linear(llama_models.models), tmp_path / "linear")
        for name, entry in merged.entries.items():
            averaged = "norm" in name or name in (EMBEDDING, HEAD)
            assert (entry["outcome"] == "averaged, as configured") == averaged, name
            if averaged:
                assert torch.equal(merged.tensors[name], stock.tensors[name])

    def test_a_filter_that_no_tensor_passes_is_warned_of(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        ridge = [{"filter": "mpl", "value": 1.0}, {"filter": "lm_head", "value": 0.1}, {"value": 1}]
        each = [{"weight": [{"filter": "mlp", "value": 2}, {"filter": "*", "value": 1}]}] * 2
        merge(dam(llama_models.models, calibration, ridge=ridge, each=each), tmp_path / "out")
        said = [text for text in caplog.messages if "no tensor's name" in text]
        assert len(said) == 1
        assert said[0].startswith("`ridge`: `mpl` is in no tensor's name")

    def test_filters_choose_by_tensor(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        granularity = [{"filter": "mlp", "value": "tensor"}, {"value": "column"}]
        configuration = dam(
            llama_models.models, calibration, granularity=granularity, head=False, holdout=0
        )
        merged = merge(configuration, tmp_path / "out")
        assert rows(merged, MLP).shape == (2, 1)
        assert rows(merged, ATTENTION).shape == (2, 16)
        saved = merged.coefficients.metadata["parameters"]["granularity"]
        assert saved == [{"filter": "mlp", "value": "tensor"}, {"value": "column"}]

    def test_gradients_run_over_the_layers(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration, ridge=[1e12, 1e-3], head=False)
        merged = merge(configuration, tmp_path / "out")
        held, fitted = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        torch.testing.assert_close(rows(merged, held), torch.full_like(rows(merged, held), 0.5))
        assert float((rows(merged, fitted) - 0.5).abs().max()) > 0.01


class TestModelParameters:
    def test_weight_sets_the_start(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        each = [{"weight": 3}, {"weight": 1}]
        configuration = dam(
            llama_models.models, calibration, base=llama_models.base, each=each, ridge=1e12
        )
        merged = merge({**configuration}, tmp_path / "out")
        start = torch.tensor([[0.75], [0.25], [0.0]])
        for name in merged.entries.keys() - {HEAD}:
            torch.testing.assert_close(rows(merged, name), start.expand_as(rows(merged, name)))

    def test_loss_weight_zero_needs_no_calibration(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(
            llama_models.models,
            [calibration[0], None],
            each=[{}, {"loss_weight": 0}],
            ridge=1e-9,
            granularity="tensor",
            head=False,
        )
        merged = merge(configuration, tmp_path / "out")
        assert list(merged.report["calibration"]) == [llama_models.models[0].name]
        # Nothing speaks for the second model's tensors but the pull to the start.
        assert mean(merged, EMBEDDING, 0) == pytest.approx(1, abs=1e-3)
        assert mean(merged, MLP, 0) == pytest.approx(1, abs=0.05)

    def test_loss_weight_tilts_the_fit(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        means = [
            mean(
                merge(
                    dam(
                        llama_models.models,
                        calibration,
                        each=[{"loss_weight": first}, {"loss_weight": 1}],
                        granularity="tensor",
                        holdout=0,
                        head=False,
                    ),
                    tmp_path / str(first),
                ),
                EMBEDDING,
                0,
            )
            for first in (0.1, 1, 10)
        ]
        assert means[0] < means[1] - 0.1 < means[2] - 0.2

    def test_a_source_may_bring_samples_of_its_own(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        texts: list[Path | str] = [f"{calibration[0]}:samples=7", calibration[1]]
        merged = merge(dam(llama_models.models, texts, head=False), tmp_path / "out")
        sequences = [p["sequences"] for p in merged.report["calibration"].values()]
        assert sequences == [7, 4]

    def test_calibration_at_top_level_holds_for_all(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration=str(calibration[0]), head=False)
        merged = merge(configuration, tmp_path / "out")
        first, second = merged.report["calibration_sha256"].values()
        assert first == second
