"""Every form of a configuration, and its effect on a whole merge."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.kit.adapters import save_adapter
from tests.kit.merging import dam, mean, merge, rows, sliced_dam
from tests.kit.models import ATTENTION, Models
from tests.kit.texts import Calibration


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
        assert merged.report["calibration"][model.name]["tokens_used"] == 64
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
        assert merged.coefficients.sources[0] == f"{llama_models.base.name}+{adapter.name}"
        assert merged.entries[ATTENTION]["outcome"] == "fitted"
        merged.load()
