"""The module `tests.common` of mergekit's tests, which its source distribution lacks.

Tiny models of the kinds that those tests name, and a merge whose output is looked at: names
and signatures are theirs. It is copied beside them by `tests.mergekit_suite.suite`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
)

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
}


def run_and_check_merge(
    config: MergeConfiguration,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], None] | None = None,
    index_json_name: str | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge into a folder that is thrown away, and see that it holds a whole, finite model."""
    index = index_json_name or "model.safetensors.index.json"
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, folder, MergeOptions())
        out = Path(folder)
        assert (out / "config.json").is_file()
        assert (out / index).is_file() or (out / index.removesuffix(".index.json")).is_file()
        if check_nan:
            loader = LazyTensorLoader.from_disk(folder)
            for name in loader.index.tensor_paths:
                tensor = loader.get_tensor(name)
                assert tensor is not None, name
                assert not tensor.isnan().any(), name
        if check_tensors:
            model = AutoConfig.from_pretrained(folder)
            options = MergeOptions()
            known = None if auto_arch else arch_info_for_config(model)
            info = known or get_architecture_info(config, options)
            written = ShardedTensorIndex.from_disk(folder).tensor_paths
            for weight in info.all_weights(model):
                names = {weight.name, *(weight.aliases or ())}
                assert weight.optional or names & written.keys(), weight.name
        if validate:
            validate(folder)


def make_picollama(path: str, vocab_size: int = 64) -> str:
    """A Llama of two layers."""
    return _save(path, LlamaConfig(**_LLAMA, vocab_size=vocab_size))


def make_picogranite(path: str, vocab_size: int = 64) -> str:
    """A Granite of two layers."""
    return _save(path, GraniteConfig(**{**_LLAMA, "num_attention_heads": 2}, vocab_size=vocab_size))


def make_gpt2size(path: str) -> str:
    """A GPT-2 as deep as the smallest, and narrower."""
    return _save(path, GPT2Config(n_embd=48, n_layer=12, n_head=12, vocab_size=512))


def make_picoLlaVa(path: str) -> str:
    """A vision-language model with two layers in each tower."""
    vision = CLIPVisionConfig(
        image_size=32,
        patch_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    text = LlamaConfig(**_LLAMA, vocab_size=64)
    model = AutoModelForImageTextToText.from_config(
        LlavaConfig(vision_config=vision, text_config=text, image_seq_length=16),
        dtype=torch.float32,
    )
    model.save_pretrained(path)
    return str(path)


def _save(path: str, config: PretrainedConfig) -> str:
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return str(path)
