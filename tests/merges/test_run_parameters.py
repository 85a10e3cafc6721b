"""Every parameter of a run, and its effect on a whole merge."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mergekit_dam.model.decoder import Decoder
from mergekit_dam.parameters import RunParameters
from tests.kit.merging import dam, merge, one_sweep_and_a_search, rows, tensors_of
from tests.kit.models import HEAD, MLP, Models
from tests.kit.texts import Calibration, save_calibration


class TestRunParameters:
    def test_holdout_zero_judges_on_the_data_of_the_fit(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        merged = merge(dam(llama_models.models, calibration, holdout=0), tmp_path / "out")
        for entry in merged.entries.values():
            assert entry["outcome"] == "fitted"
            assert entry["held_out_fitted"] == pytest.approx(entry["loss_fitted"])
            assert entry["held_out_start"] == pytest.approx(entry["loss_start"])

    def test_one_sequence_of_two_tokens_is_enough(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration, samples=1, sequence_length=2)
        merge(configuration, tmp_path / "out").load()

    def test_include_base_merges_the_base_too(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        text = save_calibration(tmp_path / "base.jsonl", seed=2, offset=12)
        models = (*llama_models.models, llama_models.base)
        configuration = dam(
            models,
            (*calibration, text),
            base=llama_models.base,
            each=[{}, {}, {"weight": 2}],
            include_base=True,
            head=False,
            ridge=1e12,
        )
        merged = merge(configuration, tmp_path / "out")
        start = torch.tensor([[0.25], [0.25], [0.5]])
        torch.testing.assert_close(rows(merged, MLP), start.expand_as(rows(merged, MLP)))
        assert llama_models.base.name in merged.report["calibration"]

    def test_temperature_softens_the_fit_of_the_head(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        losses = [
            merge(
                dam(llama_models.models, calibration, temperature=temperature),
                tmp_path / str(temperature),
            ).entries[HEAD]["held_out_start"]
            for temperature in (1.0, 4.0)
        ]
        assert losses[1] < losses[0] / 4


class TestObjective:
    @pytest.mark.parametrize("objective", ["logits", "layer+logits"])
    def test_a_single_model_has_nothing_to_fit(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path, objective: str
    ) -> None:
        model = llama_models.models[0]
        merged = merge(dam([model], calibration[:1], objective=objective), tmp_path / "out")
        for name, tensor in tensors_of(model).items():
            assert merged.tensors[name].equal(tensor), name

    @pytest.mark.parametrize("metric", ["identity", "sensitivity"])
    @pytest.mark.parametrize("objective", ["layer", "layer+logits"])
    def test_layer_fits_in_every_metric(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        objective: str,
        metric: str,
    ) -> None:
        steps: dict[str, Any] = {} if objective == "layer" else {"steps": 2}
        configuration = dam(
            llama_models.models, calibration, objective=objective, metric=metric, **steps
        )
        merged = merge(configuration, tmp_path / "out")
        searched = (objective, metric) != ("layer", "identity")
        assert bool(merged.report["search"]) == searched
        merged.load()

    @pytest.mark.parametrize(
        "parameters",
        [
            {"nonlinearity": "tanh"},
            {"nonlinearity": "sigmoid", "sum_to_one": False},
            {"nonlinearity": "relu", "sum_to_one": False},
            {"optimizer": "mofo", "mofo_fraction": 0.5},
            {"lr_schedule": "inverse_sqrt", "warmup": 0.5, "max_grad_norm": 1.0},
            {"batch_size": 1, "gradient_accumulation": 2, "learning_rate": "1e-2"},
            {"similarity": 1, "l1": 1, "l2": 1, "overlap": 1, "mse": 1, "entropy": 1},
            {"temperature": 2, "granularity": "tensor"},
            {"start": "random"},
            {"embeddings": False, "norms": False, "head": False},
        ],
        ids=str,
    )
    def test_options_of_the_logits(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        parameters: dict[str, Any],
    ) -> None:
        configuration = dam(
            llama_models.models, calibration, objective="logits", steps=2, **parameters
        )
        merged = merge(configuration, tmp_path / "out")
        assert len(merged.report["search"]) == 2
        merged.load()

    @pytest.mark.parametrize("include_base", [False, True])
    def test_weighted_overlap_with_a_base(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path, include_base: bool
    ) -> None:
        own: dict[str, Any] = {}
        if include_base:
            own = {"include_base": True, "calibration": str(calibration[0])}
        configuration = dam(
            llama_models.models,
            calibration,
            base=llama_models.base,
            objective="logits",
            steps=2,
            weighted_overlap=1,
            **own,
        )
        merge(configuration, tmp_path / "out").load()

    def test_weights_that_stay_in_memory_change_nothing(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        always, never = (
            merge(
                dam(
                    llama_models.models, calibration, objective="logits", steps=2, resident=resident
                ),
                tmp_path / resident,
            )
            for resident in ("always", "never")
        )
        assert always.model_bytes == never.model_bytes

    @one_sweep_and_a_search
    def test_streams_in_files_change_nothing_and_leave_nothing(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        own: dict[str, Any],
    ) -> None:
        host, disk = (
            merge(
                dam(llama_models.models, calibration, stream_offload=place, **own),
                tmp_path / place,
            )
            for place in ("host", "disk")
        )
        assert disk.model_bytes == host.model_bytes
        assert {p.name for p in disk.path.iterdir()} == {p.name for p in host.path.iterdir()}

    @one_sweep_and_a_search
    def test_blocks_in_half_precision_give_nearly_the_same_coefficients(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        own: dict[str, Any],
    ) -> None:
        seen: set[torch.dtype] = set()
        run = Decoder.run_block

        def watched(self: Decoder, index: int, weights: Any, hidden: Tensor) -> Tensor:
            block = self.blocks[index]
            linear = next(m for m in block.modules() if isinstance(m, nn.Linear))
            handle = linear.register_forward_hook(lambda *call: seen.add(call[2].dtype))
            try:
                return run(self, index, weights, hidden)
            finally:
                handle.remove()

        made = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            configuration = dam(llama_models.models, calibration, forward_dtype=name, **own)
            seen.clear()
            with mock.patch.object(Decoder, "run_block", watched):
                made[dtype] = merge(configuration, tmp_path / name)
            # The anatomy of a block is examined in fp32, always.
            assert seen == {torch.float32, dtype}
        for name, entry in made[torch.float32].entries.items():
            other = made[torch.bfloat16].entries[name]
            assert other["outcome"] == entry["outcome"], name
            if entry["kind"] == "linear" and entry["outcome"] == "fitted":
                half, full = (rows(made[d], name) for d in (torch.bfloat16, torch.float32))
                assert 0 < (half - full).norm() < 0.05 * full.norm(), name

    def test_a_gpu_takes_half_precision_by_default(self) -> None:
        cuda, cpu = torch.device("cuda"), torch.device("cpu")
        for asked, on_cuda, on_cpu in (
            ("auto", torch.bfloat16, torch.float32),
            ("float32", torch.float32, torch.float32),
            ("bfloat16", torch.bfloat16, torch.bfloat16),
        ):
            settings = RunParameters(forward_dtype=asked)
            assert (settings.dtype_on(cuda), settings.dtype_on(cpu)) == (on_cuda, on_cpu)

    def test_a_fit_goes_on_from_an_earlier_merge(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        first = merge(dam(llama_models.models, calibration), tmp_path / "first")
        configuration = dam(
            llama_models.models,
            calibration,
            objective="logits",
            steps=1,
            learning_rate=1e-12,
            start=str(first.path),
        )
        second = merge(configuration, tmp_path / "out")
        for name in first.entries:
            found, given = torch.broadcast_tensors(rows(second, name), rows(first, name))
            torch.testing.assert_close(found, given)

    def test_a_replay_gives_back_a_search(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        first = merge(
            dam(llama_models.models, calibration, objective="logits", steps=2), tmp_path / "first"
        )
        configuration = dam(
            llama_models.models, objective="logits", steps=2, coefficients=str(first.path)
        )
        assert merge(configuration, tmp_path / "again").model_bytes == first.model_bytes

    @pytest.mark.slow
    def test_the_defaults_alone_make_a_merge_that_replays(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = dam(llama_models.models, calibration)
        configuration["parameters"] = {"samples": 4, "sequence_length": 16}
        first = merge(configuration, tmp_path / "first")
        first.load()
        configuration["parameters"]["coefficients"] = str(first.path)
        assert merge(configuration, tmp_path / "again").model_bytes == first.model_bytes
