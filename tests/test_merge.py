"""Whole merges in process: what is written, whether it is true, and what gives it back."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel

import mergekit_dam
from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.coefficients.file import FILE_NAME, CoefficientFile
from mergekit_dam.errors import DamError
from tests.merging import SMALL, Merged, dam, linear, merge, tensors_of, watched_reads
from tests.models import VOCAB_SIZE, Models, make_tokenizer, save_models, tiny_llama_config

HELD_OUT = 2
"""Sequences of each model that judge the fit of the merge below."""

Calibration = tuple[Path, Path]


@pytest.fixture(scope="module")
def configuration(llama_models: Models, calibration: Calibration) -> dict[str, Any]:
    return dam(
        llama_models.models, calibration, base=llama_models.base, samples=6, holdout=HELD_OUT / 6
    )


@pytest.fixture(scope="module")
def merged(configuration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return merge(configuration, tmp_path_factory.mktemp("merged") / "out")


def tokens_of(model: Path, text: Path) -> Tensor:
    """The calibration tokens of a model in the merge above, `[sequences, length]`."""
    return load_calibration(
        str(text),
        model=str(model),
        tokenizer=make_tokenizer(),
        samples=6,
        sequence_length=SMALL["sequence_length"],
        vocab_size=VOCAB_SIZE,
        seed=0,
    ).tokens


class TestOutput:
    def test_holds_model_coefficients_report_card_and_tokenizer(self, merged: Merged) -> None:
        names = {path.name for path in merged.path.iterdir()}
        assert names >= {
            "config.json",
            "dam_coefficients.safetensors",
            "dam_report.json",
            "mergekit_config.yml",
            "model.safetensors",
            "README.md",
            "tokenizer.json",
        }
        assert not [name for name in names if name.endswith(".tmp")]

    def test_loads_without_a_missing_or_unexpected_weight(
        self, merged: Merged, calibration: Calibration
    ) -> None:
        logits = merged.load()(torch.arange(8)[None]).logits
        assert torch.isfinite(logits).all()

    def test_has_the_tensors_of_its_sources(self, merged: Merged, llama_models: Models) -> None:
        source = tensors_of(llama_models.models[0])
        assert {n: (t.shape, t.dtype) for n, t in merged.tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in source.items()
        }

    def test_is_the_sum_of_its_sources_times_the_coefficients(
        self, merged: Merged, llama_models: Models
    ) -> None:
        sources = [tensors_of(Path(source)) for source in merged.coefficients.sources]
        for name, tensor in merged.tensors.items():
            pairs = zip(merged.coefficients.coefficients[name], sources, strict=True)
            expected = sum(row.double() * source[name].double() for row, source in pairs)
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)

    def test_model_card_names_the_method_and_its_paper(
        self, merged: Merged, llama_models: Models
    ) -> None:
        _, header, card = (merged.path / "README.md").read_text("utf-8").split("---\n", 2)
        assert set(yaml.safe_load(header)["tags"]) == {"mergekit", "merge"}
        assert "[Differentiable Adaptive Merging](https://arxiv.org/abs/2410.08371)" in card
        assert str(llama_models.models[1]) in card

    def test_holds_the_configuration(self, merged: Merged, configuration: dict[str, Any]) -> None:
        saved = yaml.safe_load((merged.path / "mergekit_config.yml").read_text("utf-8"))
        assert saved["merge_method"] == "dam"
        assert saved["parameters"] == configuration["parameters"]


class TestCoefficients:
    def test_are_fp32_rows_of_the_sources_for_every_tensor(
        self, merged: Merged, llama_models: Models
    ) -> None:
        saved = merged.coefficients
        assert saved.sources == (*map(str, llama_models.models), str(llama_models.base))
        assert saved.coefficients.keys() == merged.tensors.keys()
        for name, rows in saved.coefficients.items():
            assert rows.dtype == torch.float32
            assert rows.shape in {(3, merged.tensors[name].shape[-1]), (3, 1)}, name

    def test_sum_to_one_with_the_base(self, merged: Merged) -> None:
        for rows in merged.coefficients.coefficients.values():
            torch.testing.assert_close(rows.sum(0), torch.ones(rows.shape[1]), rtol=0, atol=1e-5)

    def test_carry_their_provenance(
        self,
        merged: Merged,
        configuration: dict[str, Any],
        llama_models: Models,
        calibration: Calibration,
    ) -> None:
        metadata = merged.coefficients.metadata
        packages = ("mergekit", "torch", "transformers", "safetensors")
        assert metadata["versions"] == {
            "mergekit-dam": mergekit_dam.__version__,
            **{package: version(package) for package in packages},
        }
        assert metadata["parameters"] == configuration["parameters"]
        assert metadata["calibration_sha256"] == {
            str(model): hashlib.sha256(tokens_of(model, text).numpy().tobytes()).hexdigest()
            for model, text in zip(llama_models.models, calibration, strict=True)
        }


class TestReport:
    def test_has_an_entry_for_every_tensor(self, merged: Merged) -> None:
        assert merged.entries.keys() == merged.tensors.keys()
        assert len(merged.entries) == len(merged.report["tensors"])
        for entry in merged.entries.values():
            losses = {"loss_start", "loss_fitted", "held_out_start", "held_out_fitted"}
            assert losses <= entry.keys()
            assert entry["seconds"] > 0
            assert entry["solver"]["method"] in {"cholesky", "adam"}
            if entry["outcome"] == "fitted":
                assert entry["held_out_fitted"] < entry["held_out_start"]
            else:
                assert entry["outcome"] == "start kept: held-out loss was not better"

    def test_describes_the_coefficients(self, merged: Merged) -> None:
        saved = merged.coefficients
        assert merged.report["sources"] == list(saved.sources)
        for name, entry in merged.entries.items():
            for source, row in zip(saved.sources, saved.coefficients[name], strict=True):
                statistics = entry["coefficients"][source]
                assert statistics["mean"] == pytest.approx(row.mean().item(), abs=1e-6)
                assert statistics["min"] == row.min().item()
                assert statistics["max"] == row.max().item()

    def test_says_what_the_merge_cost(self, merged: Merged) -> None:
        seconds = merged.report["seconds"]
        assert list(seconds) == ["input", "block 1/2", "block 2/2", "output"]
        assert all(value > 0 for value in seconds.values())
        assert merged.report["peak_memory_bytes"]["host"] > 2**20

    def test_says_what_it_was_made_from(
        self, merged: Merged, llama_models: Models, calibration: Calibration
    ) -> None:
        report, metadata = merged.report, merged.coefficients.metadata
        assert not report["replayed"]
        assert {key: report[key] for key in metadata if key != "axes"} == {
            key: value for key, value in metadata.items() if key != "axes"
        }
        for model, text in zip(llama_models.models, calibration, strict=True):
            provenance = report["calibration"][str(model)]
            assert provenance["files"] == [text.as_posix()]
            assert provenance["sequences"] == 6


class Run:
    """Outputs of all modules, and the streams behind the blocks, of one forward pass."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.streams: dict[int, Tensor] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, tokens: Tensor) -> Run:
        run = cls()
        handles = []
        for name, module in model.named_modules():

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    run.outputs[name] = output.clone()

            handles.append(module.register_forward_hook(keep))
        model(tokens)
        for handle in handles:
            handle.remove()
        run.streams = {layer: run.outputs[f"model.layers.{layer}"] for layer in (0, 1)}
        return run


@pytest.fixture(scope="module")
def runs(merged: Merged, llama_models: Models, calibration: Calibration) -> list[tuple[Run, Run]]:
    """(teacher, merged model) on the held-out text of each model."""
    output = merged.load()
    return [
        (Run.of(AutoModelForCausalLM.from_pretrained(model), held_out), Run.of(output, held_out))
        for model, text in zip(llama_models.models, calibration, strict=True)
        for held_out in [tokens_of(model, text)[-HELD_OUT:]]
    ]


ONE_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Linears that share an input are fitted together, with the same weights of tokens."""


class TestLosses:
    """The report's held-out losses against the same measured with transformers alone."""

    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize(
        "unit",
        [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "input_layernorm",
            "post_attention_layernorm",
        ],
    )
    def test_inside_a_block_is_the_distance_to_the_teachers_output(
        self, merged: Merged, runs: list[tuple[Run, Run]], layer: int, unit: str
    ) -> None:
        name = f"model.layers.{layer}.{unit}"
        parent, _, last = name.rpartition(".")
        group = next((g for g in ONE_INPUT if last in g), (last,))
        expected = [
            distance(
                teacher.outputs[name] - own.outputs[name],
                teacher.outputs[name],
                weights([teacher.outputs[f"{parent}.{member}"] for member in group]),
            )
            for teacher, own in runs
        ]
        assert loss_of(merged, name) == pytest.approx(sum(expected) / 2, rel=1e-3)

    @pytest.mark.parametrize("layer", [0, 1])
    def test_at_the_end_of_a_block_is_the_distance_of_the_streams(
        self, merged: Merged, runs: list[tuple[Run, Run]], layer: int
    ) -> None:
        name = f"model.layers.{layer}.mlp.down_proj"
        expected = [
            distance(
                teacher.streams[layer] - own.streams[layer],
                teacher.outputs[name],
                # What would bring the merged stream onto the teacher's.
                weights([teacher.streams[layer] - own.streams[layer] + own.outputs[name]]),
            )
            for teacher, own in runs
        ]
        assert loss_of(merged, name) == pytest.approx(sum(expected) / 2, rel=1e-3)

    def test_of_the_final_norm_is_the_distance_to_the_teachers(
        self, merged: Merged, runs: list[tuple[Run, Run]]
    ) -> None:
        name = "model.norm"
        expected = [
            distance(
                teacher.outputs[name] - own.outputs[name],
                teacher.outputs[name],
                weights([teacher.outputs[name]]),
            )
            for teacher, own in runs
        ]
        assert loss_of(merged, name) == pytest.approx(sum(expected) / 2, rel=1e-3)

    def test_of_the_embedding_counts_every_token_alike(
        self, merged: Merged, runs: list[tuple[Run, Run]]
    ) -> None:
        name = "model.embed_tokens"
        expected = [
            distance(
                teacher.outputs[name] - own.outputs[name],
                teacher.outputs[name],
                torch.ones(teacher.outputs[name].shape[:2]),
            )
            for teacher, own in runs
        ]
        assert loss_of(merged, name) == pytest.approx(sum(expected) / 2, rel=1e-3)

    def test_of_the_head_is_the_divergence_of_the_distributions(
        self, merged: Merged, runs: list[tuple[Run, Run]]
    ) -> None:
        expected = [
            kl_div(
                log_softmax(own.outputs["lm_head"], -1),
                log_softmax(teacher.outputs["lm_head"], -1),
                log_target=True,
                reduction="none",
            )
            .sum(-1)
            .mean()
            .item()
            for teacher, own in runs
        ]
        assert loss_of(merged, "lm_head") == pytest.approx(sum(expected) / 2, rel=1e-3)


def weights(targets: Sequence[Tensor]) -> Tensor:
    """Of every token: one, but less where its targets exceed the median of its sequence."""
    excess = []
    for target in targets:
        energies = target.square().sum(-1)
        median = energies.sort(dim=1).values[:, (energies.shape[1] - 1) // 2]
        excess.append(energies / median[:, None])
    return 1 / torch.stack(excess).mean(0).clamp(min=1)


def distance(error: Tensor, output: Tensor, weight: Tensor) -> float:
    """Energy of an error as a fraction of the output's, tokens weighted."""
    energies = [(weight.double() * x.double().square().sum(-1)).sum() for x in (error, output)]
    return float(energies[0] / energies[1])


def loss_of(merged: Merged, unit: str) -> float:
    entry = merged.entries[f"{unit}.weight"]
    which = "fitted" if entry["outcome"] == "fitted" else "start"
    loss: float = entry[f"held_out_{which}"]
    return loss


class TestReplay:
    @pytest.fixture
    def elsewhere(self, llama_models: Models, tmp_path: Path) -> Models:
        """The same models in another folder, as in a CI job."""
        root = llama_models.base.parent
        shutil.copytree(root, tmp_path / "moved")
        return Models(
            tmp_path / "moved" / llama_models.base.name,
            tuple(tmp_path / "moved" / model.name for model in llama_models.models),
        )

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
        for name, tensor in merged.tensors.items():
            torch.testing.assert_close(again.tensors[name], tensor)
        rows = again.coefficients.coefficients["lm_head.weight"]
        assert torch.equal(rows, merged.coefficients.coefficients["lm_head.weight"][[1, 0, 2]])

    def test_finds_moved_models_by_position(
        self,
        merged: Merged,
        elsewhere: Models,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        configuration = dam(elsewhere.models, base=elsewhere.base, coefficients=str(merged.path))
        again = merge(configuration, tmp_path / "out")
        assert again.model_bytes == merged.model_bytes
        (warning,) = [r for r in caplog.records if r.name.startswith("mergekit_dam")]
        assert warning.levelno == logging.WARNING
        assert "models go by other names now" in warning.getMessage()
        assert f"{elsewhere.models[0]} as {merged.coefficients.sources[0]}" in warning.getMessage()

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
        configuration = dam(wide.models, base=wide.base, coefficients=str(merged.path))
        refused(configuration, tmp_path / "out", "model.embed_tokens.weight", "32", "16")

    def test_of_more_layers_is_refused(self, merged: Merged, tmp_path: Path) -> None:
        deep = save_models(tmp_path, tiny_llama_config(num_hidden_layers=3), count=2)
        configuration = dam(deep.models, base=deep.base, coefficients=str(merged.path))
        refused(configuration, tmp_path / "out", "has none for model.layers.2.")


def refused(configuration: dict[str, Any], out: Path, *messages: str) -> None:
    """Assert that a merge is refused with messages, before any weight is read."""
    with watched_reads() as reads, pytest.raises(DamError) as error:
        merge(configuration, out)
    for message in messages:
        assert message in str(error.value)
    assert reads.order == []
    assert not out.exists()


class TestDeterminism:
    def test_two_runs_give_the_same_bytes(
        self, merged: Merged, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        again = merge(configuration, tmp_path / "out")
        assert again.model_bytes == merged.model_bytes
        assert again.coefficient_bytes == merged.coefficient_bytes

    def test_another_seed_takes_other_text(
        self, merged: Merged, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        parameters = {**configuration["parameters"], "head": False, "seed": 1}
        again = merge({**configuration, "parameters": parameters}, tmp_path / "a")
        assert again.model_bytes != merged.model_bytes
        parameters = {**configuration["parameters"], "head": False}
        by_option = merge(
            {**configuration, "parameters": parameters}, tmp_path / "b", random_seed=1
        )
        assert by_option.model_bytes == again.model_bytes


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
