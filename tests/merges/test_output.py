"""The files that a merge writes."""

import hashlib
from importlib.metadata import version
from typing import Any

import pytest
import torch
import yaml

import mergekit_dam
from tests.kit.merging import SAMPLES, Merged, tensors_of
from tests.kit.models import Models
from tests.kit.texts import Calibration, calibration_tokens
from tests.kit.tokenizers import make_tokenizer


class TestOutput:
    def test_holds_model_coefficients_report_card_and_tokenizer(self, merged: Merged) -> None:
        names = {path.name for path in merged.path.iterdir()}
        assert names >= {
            "config.json",
            "dam_coefficients.safetensors",
            "dam_coefficients.svg",
            "dam_report.html",
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
        sources = [tensors_of(folder) for folder in (*llama_models.models, llama_models.base)]
        for name, tensor in merged.tensors.items():
            pairs = zip(merged.coefficients.coefficients[name], sources, strict=True)
            expected = sum(row.double() * source[name].double() for row, source in pairs)
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)

    def test_model_card_names_the_method_and_its_paper(
        self, merged: Merged, llama_models: Models
    ) -> None:
        _, header, card = (merged.path / "README.md").read_text("utf-8").split("---\n", 2)
        assert yaml.safe_load(header)["tags"] == ["mergekit", "merge", "dam"]
        assert "[Differentiable Adaptive Merging](https://arxiv.org/abs/2410.08371)" in card
        assert f"\n* {llama_models.models[1].name}\n" in card

    def test_holds_the_configuration(self, merged: Merged, configuration: dict[str, Any]) -> None:
        saved = yaml.safe_load((merged.path / "mergekit_config.yml").read_text("utf-8"))
        assert saved["merge_method"] == "dam"
        assert saved["parameters"] == configuration["parameters"]


class TestCoefficients:
    def test_are_fp32_rows_of_the_sources_for_every_tensor(
        self, merged: Merged, llama_models: Models
    ) -> None:
        saved = merged.coefficients
        folders = (*llama_models.models, llama_models.base)
        assert saved.sources == tuple(folder.name for folder in folders)
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
            model.name: hashlib.sha256(
                calibration_tokens(text, make_tokenizer(), samples=SAMPLES).numpy().tobytes()
            ).hexdigest()
            for model, text in zip(llama_models.models, calibration, strict=True)
        }


class TestReport:
    def test_has_an_entry_for_every_tensor(self, merged: Merged) -> None:
        assert merged.entries.keys() == merged.tensors.keys()
        assert len(merged.entries) == len(merged.report["tensors"])
        for entry in merged.entries.values():
            losses = {"held_out_start", "held_out_fitted"}
            if entry["kind"] != "head":  # whose loss on the data of the fit is not measured
                losses |= {"loss_start", "loss_fitted"}
            assert losses <= entry.keys()
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
        run = merged.report["this_run"]
        seconds = run["seconds"]
        assert list(seconds) == ["input", "block 1/2", "block 2/2", "output"]
        assert all(value > 0 for value in seconds.values())
        assert run["tensor_seconds"].keys() == merged.tensors.keys()
        assert all(value > 0 for value in run["tensor_seconds"].values())
        assert run["peak_memory_bytes"]["host"] > 2**20

    def test_says_what_it_was_made_from(
        self, merged: Merged, llama_models: Models, calibration: Calibration
    ) -> None:
        report, metadata = merged.report, merged.coefficients.metadata
        assert not report["replayed"]
        assert {key: report[key] for key in metadata if key != "axes"} == {
            key: value for key, value in metadata.items() if key != "axes"
        }
        for model, text in zip(llama_models.models, calibration, strict=True):
            provenance = report["calibration"][model.name]
            assert provenance["files"] == [text.name]
            assert provenance["sequences"] == 6
