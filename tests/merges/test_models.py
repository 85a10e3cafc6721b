"""One model, many models, adapters, shards, tied heads: merges of models of every kind."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kit.merging import dam, merge, rows, tensors_of
from tests.kit.models import EMBEDDING, HEAD, Models, make_model, save_models, tiny_llama_config
from tests.kit.texts import Calibration, save_calibration
from tests.kit.tokenizers import make_tokenizer


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

    def test_a_head_of_its_own_counts_whatever_the_configuration_says(
        self, llama_models: Models, calibration: Calibration, tmp_path: Path
    ) -> None:
        expected = merge(dam(llama_models.models, calibration, samples=8), tmp_path / "expected")
        flagged = []
        for number, model in enumerate(llama_models.models):
            flagged.append(shutil.copytree(model, tmp_path / str(number)))
            config = json.loads((flagged[-1] / "config.json").read_text("utf-8"))
            config["tie_word_embeddings"] = True
            (flagged[-1] / "config.json").write_text(json.dumps(config), "utf-8")
        merged = merge(dam(flagged, calibration, samples=8), tmp_path / "out")
        assert merged.model_bytes == expected.model_bytes
        assert merged.load().config.tie_word_embeddings is False

    def test_a_model_that_computes_otherwise_is_named(
        self,
        llama_models: Models,
        calibration: Calibration,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        other = shutil.copytree(llama_models.models[1], tmp_path / "other")
        config = json.loads((other / "config.json").read_text("utf-8"))
        config |= {"hidden_act": "gelu", "unsloth_version": "1", "attention_dropout": 0.1}
        (other / "config.json").write_text(json.dumps(config), "utf-8")
        merge(dam([llama_models.models[0], other], calibration), tmp_path / "out")
        (said,) = (record.message for record in caplog.records if "otherwise" in record.message)
        assert str(other) in said
        assert "`hidden_act` gelu, not silu. " in said

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
