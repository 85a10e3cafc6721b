"""What every parameter, and every form of a configuration, does to a whole merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from mergekit_dam.errors import ConfigError
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.parameters import RunParameters
from mergekit_dam.request.prepare import run_settings
from tests.merging import Merged, dam, linear, merge, tensors_of
from tests.models import (
    Models,
    make_model,
    make_tokenizer,
    save_calibration,
    save_models,
    tiny_llama_config,
)

MLP = "model.layers.1.mlp.up_proj.weight"
ATTENTION = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Calibration = tuple[Path, Path]

one_sweep_and_a_search = pytest.mark.parametrize(
    "own",
    [
        {"objective": "layer", "metric": "identity"},
        {"objective": "layer+logits", "metric": "sensitivity", "steps": 2},
    ],
    ids=str,
)


def rows(merged: Merged, name: str) -> Tensor:
    return merged.coefficients.coefficients[name]


def mean(merged: Merged, name: str, source: int) -> float:
    return rows(merged, name)[source].mean().item()


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
        assert list(merged.report["calibration"]) == [str(llama_models.models[0])]
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
        assert str(llama_models.base) in merged.report["calibration"]

    def test_temperature_softens_the_fit_of_the_head(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        losses = [
            merge(
                dam(llama_models.models, calibration, temperature=temperature),
                tmp_path / str(temperature),
            ).entries[HEAD]["loss_start"]
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

    def test_a_gpu_takes_half_precision_unless_told_otherwise(self) -> None:
        cuda, cpu = torch.device("cuda"), torch.device("cpu")
        for asked, on_cuda, on_cpu in (
            ("auto", torch.bfloat16, torch.float32),
            ("float32", torch.float32, torch.float32),
            ("bfloat16", torch.bfloat16, torch.bfloat16),
        ):
            settings = run_settings(RunParameters(forward_dtype=asked), seed=0)
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

    def test_what_was_searched_is_replayed(
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


class TestModels:
    def test_one_model_is_copied_bit_for_bit(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        model = llama_models.models[0]
        merged = merge(dam([model]), tmp_path / "out")
        assert {entry["outcome"] for entry in merged.entries.values()} == {
            "copied: of one model alone"
        }
        source = tensors_of(model)
        assert all(torch.equal(tensor, source[n]) for n, tensor in merged.tensors.items())

    def test_eight_models(self, tmp_path: Path) -> None:
        models = save_models(tmp_path, tiny_llama_config(num_hidden_layers=1), count=8)
        texts = [save_calibration(tmp_path, seed=k, offset=6 * k) for k in range(8)]
        merged = merge(dam(models.models, texts, base=models.base), tmp_path / "out")
        assert rows(merged, EMBEDDING).shape[0] == 9
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}
        merged.load()

    @pytest.mark.parametrize("heads", [(), (0, 1), (0,), (1,)])
    def test_tied_embeddings_saved_with_and_without_a_head(
        self, tmp_path: Path, heads: Sequence[int]
    ) -> None:
        models = save_models(tmp_path, tiny_llama_config(tie_word_embeddings=True), count=2)
        for index in heads:
            save_head(models.models[index])
        texts = [save_calibration(tmp_path, seed=k, offset=24 * k) for k in (0, 1)]
        merged = merge(dam(models.models, texts, samples=8), tmp_path / "out")
        assert (HEAD in merged.tensors) == bool(heads)
        if heads:
            assert torch.equal(merged.tensors[HEAD], merged.tensors[EMBEDDING])
            assert merged.entries[HEAD]["outcome"] == f"tied to {EMBEDDING}"
        model = merged.load()
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        again = merge(dam(models.models, coefficients=str(merged.path)), tmp_path / "again")
        assert again.model_bytes == merged.model_bytes

    def test_a_tied_model_joins_untied_ones(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        tied = save_models(tmp_path, tiny_llama_config(tie_word_embeddings=True), count=1)
        models = [llama_models.models[0], tied.models[0]]
        merged = merge(dam(models, calibration, samples=8), tmp_path / "out")
        assert merged.entries[HEAD]["kind"] == "head"
        assert not merged.load().config.tie_word_embeddings

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_models_of_half_precision_stay_so(
        self, calibration: Calibration, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        models = save_models(tmp_path, tiny_llama_config(), count=2, dtype=dtype)
        merged = merge(dam(models.models, calibration, head=False), tmp_path / "out")
        assert {tensor.dtype for tensor in merged.tensors.values()} == {dtype}
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}
        merged.load()

    def test_out_dtype_is_what_is_written_and_judged(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        plain = merge(dam(llama_models.models, calibration, head=False), tmp_path / "plain")
        configuration = dam(
            llama_models.models, calibration, head=False, settings={"out_dtype": "bfloat16"}
        )
        merged = merge(configuration, tmp_path / "out")
        assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}
        assert torch.equal(rows(merged, EMBEDDING), rows(plain, EMBEDDING))
        losses = [m.entries[EMBEDDING]["loss_start"] for m in (plain, merged)]
        assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)
        assert json.loads((merged.path / "config.json").read_text())["dtype"] == "bfloat16"

    def test_models_of_several_shards(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        sharded = []
        for model in llama_models.models:
            sharded.append(tmp_path / model.name)
            make_model(tiny_llama_config()).from_pretrained(model).save_pretrained(
                sharded[-1], max_shard_size="8KB"
            )
            make_tokenizer().save_pretrained(sharded[-1])
            assert len(list(sharded[-1].glob("*.safetensors"))) > 2
        whole = merge(dam(llama_models.models, calibration, head=False), tmp_path / "whole")
        merged = merge(dam(sharded, calibration, head=False), tmp_path / "out")
        assert merged.model_bytes == whole.model_bytes


def save_head(model: Path) -> None:
    """Write the tied head out, as some checkpoints do."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, file, metadata={"format": "pt"})


class TestTokenizers:
    @pytest.mark.parametrize(
        "settings",
        [
            {"tokenizer": {"source": "base"}},
            {"tokenizer": {"source": "union"}},
            {"tokenizer_source": "union"},
            {"tokenizer": {"source": "base", "pad_to_multiple_of": 32}},
        ],
        ids=str,
    )
    def test_of_equal_vocabularies_are_aligned(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        settings: dict[str, Any],
    ) -> None:
        plain = merge(dam(llama_models.models, calibration, head=False), tmp_path / "plain")
        configuration = dam(llama_models.models, calibration, head=False, settings=settings)
        merged = merge(configuration, tmp_path / "out")
        known = len(make_tokenizer())
        rows_left = 64 if "pad" in str(settings) else known
        assert merged.tensors[EMBEDDING].shape == merged.tensors[HEAD].shape == (rows_left, 16)
        assert merged.load().config.vocab_size == rows_left
        assert len(AutoTokenizer.from_pretrained(merged.path)) == known
        for name in plain.tensors.keys() - {HEAD}:
            torch.testing.assert_close(merged.tensors[name][:known], plain.tensors[name][:known])

    def test_union_takes_the_tokens_that_one_model_has(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        other, text = model_with_new_words(tmp_path)
        configuration = dam(
            [llama_models.models[0], other],
            [calibration[0], text],
            settings={"tokenizer": {"source": "union"}},
        )
        merged = merge(configuration, tmp_path / "out")
        known = len(make_tokenizer()) + 2
        assert merged.tensors[EMBEDDING].shape == (known, 16)
        assert len(AutoTokenizer.from_pretrained(merged.path)) == known
        merged.load()

    def test_without_a_base_the_first_model_gives_its_own(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        other, text = model_with_new_words(tmp_path)
        for index, (models, texts) in enumerate(
            [
                ([llama_models.models[0], other], [calibration[0], calibration[1]]),
                ([other, llama_models.models[0]], [text, calibration[0]]),
            ]
        ):
            merged = merge(dam(models, texts, head=False), tmp_path / str(index))
            assert len(AutoTokenizer.from_pretrained(merged.path)) == len(make_tokenizer()) + (
                2 * index
            )


def model_with_new_words(folder: Path) -> tuple[Path, Path]:
    """A model whose tokenizer knows two words more, and text that has them."""
    model = make_model(tiny_llama_config(), seed=3)
    model.save_pretrained(folder / "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["alpha", "beta"])
    tokenizer.save_pretrained(folder / "other")
    text = folder / "other.jsonl"
    line = json.dumps({"text": "alpha cat beta dog " * 5})
    text.write_text("\n".join([line] * 40), encoding="utf-8")
    return folder / "other", text


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


class TestForms:
    def test_slices_of_all_layers_are_the_whole_merge(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        whole = merge(dam(llama_models.models, calibration, head=False), tmp_path / "whole")
        sliced = merge(
            sliced_dam(llama_models.models, calibration, [(0, 1), (1, 2)]), tmp_path / "out"
        )
        assert sliced.model_bytes == whole.model_bytes
        once = merge(sliced_dam(llama_models.models, calibration, [(0, 2)]), tmp_path / "once")
        assert once.model_bytes == whole.model_bytes

    def test_slices_may_list_the_models_in_any_order(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        weights = (3.0, 1.0)
        configuration = sliced_dam(
            llama_models.models, calibration, [(0, 1), (1, 2)], weights=weights, ridge=1e12
        )
        configuration["slices"][1]["sources"].reverse()
        merged = merge(configuration, tmp_path / "out")
        for name in (ATTENTION.replace("1", "0"), ATTENTION, "model.norm.weight"):
            assert mean(merged, name, 0) == pytest.approx(0.75, abs=1e-4)

    def test_slices_stack_some_layers_twice(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = sliced_dam(llama_models.models, calibration, [(0, 2), (1, 2)])
        merged = merge(configuration, tmp_path / "out")
        assert merged.load().config.num_hidden_layers == 3
        assert "model.layers.2.mlp.up_proj.weight" in merged.entries

    def test_slices_have_parameters_of_their_own(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = sliced_dam(llama_models.models, calibration, [(0, 1), (1, 2)])
        configuration["slices"][1]["parameters"] = {"granularity": "tensor"}
        merged = merge(configuration, tmp_path / "out")
        assert {
            rows(merged, name).shape[1]
            for name, entry in merged.entries.items()
            if ".layers.1." in name and entry["outcome"] == "fitted"
        } == {1}
        assert rows(merged, "model.layers.0.input_layernorm.weight").shape[1] == 16

    def test_slices_with_a_base_among_the_sources(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        configuration = sliced_dam(llama_models.models, calibration, [(0, 1), (1, 2)])
        configuration["base_model"] = str(llama_models.base)
        for index, entry in enumerate(configuration["slices"]):
            entry["sources"].append(
                {"model": str(llama_models.base), "layer_range": [index, index + 1]}
            )
        merged = merge(configuration, tmp_path / "out")
        whole = merge(
            dam(llama_models.models, calibration, base=llama_models.base, head=False),
            tmp_path / "whole",
        )
        assert merged.model_bytes == whole.model_bytes

    def test_modules(self, llama_models: Models, calibration: Calibration, tmp_path: Path) -> None:
        configuration = dam(llama_models.models, calibration, head=False)
        whole = merge(configuration, tmp_path / "whole")
        models = configuration.pop("models")
        configuration["modules"] = {"default": {"models": models}}
        assert merge(configuration, tmp_path / "out").model_bytes == whole.model_bytes

    def test_chats_are_read_with_the_models_template(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        model = tmp_path / "chatty"
        shutil.copytree(llama_models.models[0], model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
        tokenizer.save_pretrained(model)
        chat = [{"role": "user", "content": "one plus two"}, {"role": "assistant", "content": "is"}]
        text = tmp_path / "chat.jsonl"
        text.write_text("\n".join([json.dumps({"messages": chat})] * 40), encoding="utf-8")
        configuration = dam([model, llama_models.models[1]], [text, calibration[1]], head=False)
        merged = merge(configuration, tmp_path / "out")
        assert merged.report["calibration"][str(model)]["tokens_used"] == 64
        merged.load()

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
    def test_an_adapter_on_a_base_is_a_model(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        adapter = save_adapter(llama_models.base, tmp_path / "adapter")
        reference = Path(f"{llama_models.base}+{adapter}")
        configuration = dam(
            [reference, llama_models.models[1]], calibration, base=llama_models.base, head=False
        )
        merged = merge(configuration, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
        assert merged.coefficients.sources[0] == str(reference)
        assert merged.entries[ATTENTION]["outcome"] == "fitted"
        merged.load()


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


def sliced_dam(
    models: Sequence[Path],
    calibration: Calibration,
    ranges: Sequence[tuple[int, int]],
    *,
    weights: Sequence[float] = (1.0, 1.0),
    **parameters: Any,
) -> dict[str, Any]:
    """A merge of slices with the same layers of every model."""
    configuration = dam(models, head=False, **parameters)
    del configuration["models"]
    own = [
        {"calibration": str(text), "weight": weight}
        for text, weight in zip(calibration, weights, strict=True)
    ]
    configuration["slices"] = [
        {
            "sources": [
                {"model": str(model), "layer_range": list(layers), "parameters": parameters}
                for model, parameters in zip(models, own, strict=True)
            ]
        }
        for layers in ranges
    ]
    return configuration


def save_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter on the query projections of a model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model(tiny_llama_config()).from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # A as well: peft draws it from whatever state torch is in
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder
