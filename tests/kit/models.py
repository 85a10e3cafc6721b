"""Tiny models made in code: one of every architecture, saved as a base and its fine-tunes.

    models = save_models(tmp_path, tiny_llama_config(), count=2)
    text = save_calibration(tmp_path / "text.jsonl")

Everything is drawn from a seed: the same call writes the same bytes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from tests.kit.tokenizers import make_tokenizer

VOCAB_SIZE = 64
"""Rows of every embedding: a few more than the tokenizer knows words, as real models have."""
POSITIONS = 64

_LAYERS = 2
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_SIZES: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Models:
    """Folders of saved models."""

    base: Path
    models: tuple[Path, ...]


def tiny_llama_config(**overrides: Any) -> LlamaConfig:
    """Two layers, 16 wide, grouped attention, untied unless asked for."""
    return LlamaConfig(**{**_GROUPED, **overrides})


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": tiny_llama_config,
    "llama-tied": partial(tiny_llama_config, tie_word_embeddings=True),
    "gpt2": partial(
        GPT2Config,
        **_COMMON,
        n_embd=16,
        n_inner=24,
        n_layer=_LAYERS,
        n_head=2,
        n_positions=POSITIONS,
    ),
    "gemma2": partial(Gemma2Config, **_GROUPED, head_dim=8, sliding_window=4),
    "gemma3": partial(
        Gemma3TextConfig,
        **_GROUPED,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "olmo2": partial(Olmo2Config, **_GROUPED),
    "gpt-neox": partial(GPTNeoXConfig, **_SIZES),
    "falcon": partial(
        FalconConfig,
        **_COMMON,
        hidden_size=16,
        ffn_hidden_size=24,
        num_hidden_layers=_LAYERS,
        num_attention_heads=2,
        num_kv_heads=1,
        new_decoder_architecture=True,
        max_position_embeddings=POSITIONS,
    ),
    "bloom": partial(BloomConfig, **_COMMON, hidden_size=16, n_layer=_LAYERS, n_head=2),
    "granite": partial(
        GraniteConfig,
        **_GROUPED,
        residual_multiplier=0.25,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        attention_multiplier=0.3,
    ),
    "cohere": partial(CohereConfig, **_GROUPED, logit_scale=0.5),
    "phi": partial(PhiConfig, **_GROUPED),
    "qwen2": partial(Qwen2Config, **_GROUPED),
    "qwen3": partial(Qwen3Config, **_GROUPED, head_dim=8),
    "starcoder2": partial(Starcoder2Config, **_GROUPED),
    "stablelm": partial(StableLmConfig, **_GROUPED),
    "phi3": partial(Phi3Config, **_GROUPED),
    "mixtral": partial(MixtralConfig, **_GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "mistral": partial(MistralConfig, **_GROUPED, sliding_window=4),
}
"""A tiny configuration of every architecture under test, by name."""


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights by name, tied ones once, with the buffers that a checkpoint holds."""
    saved = model.state_dict(keep_vars=True)
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: weight.detach() for name, weight in named if name in saved}


def _floating_weights(model: PreTrainedModel) -> list[Tensor]:
    return [weight for weight in weights_of(model).values() if weight.is_floating_point()]


def make_model(
    config: PretrainedConfig, seed: int = 0, kind: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """A model in fp32 whose every weight is random, norms and biases included.

    Args:
        kind: class of the model; by default transformers' class of causal language models.
    """
    build = AutoModelForCausalLM.from_config if kind is None else kind._from_config
    # Other implementations of experts round differently from a model that runs in parts.
    model: PreTrainedModel = build(
        config, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in _floating_weights(model):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                # A stream of unit size, whatever the width.
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                # Norms keep what they start from (ones, or zeros where one is added).
                parameter.add_(0.1 * noise)
    return model


def fine_tune(model: PreTrainedModel, seed: int, scale: float) -> None:
    """Add noise to every parameter in place: `scale` of its own size, and of 1 for vectors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in _floating_weights(model):
            size = parameter.square().mean().sqrt() if parameter.ndim > 1 else 1.0
            parameter.add_(scale * size * torch.randn(parameter.shape, generator=generator))


def save_models(
    folder: Path,
    config: PretrainedConfig,
    *,
    count: int = 2,
    seed: int = 0,
    scale: float = 0.2,
    dtype: torch.dtype = torch.float32,
    kind: type[PreTrainedModel] | None = None,
) -> Models:
    """Save a base and `count` fine-tunes of it, each with a tokenizer.

    Args:
        folder: gets `base`, `model_0`, `model_1`, ...
        scale: size of the fine-tunes' deltas, relative to the base's weights.
        dtype: dtype of the saved weights.
        kind: class of the models; by default transformers' class of causal language models.
    """

    def save(name: str, model: PreTrainedModel) -> Path:
        path = folder / name
        if dtype != torch.float32:  # which they are in
            nn.Module.to(model, dtype)
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
        return path

    base = save("base", make_model(config, seed, kind))
    models = []
    for index in range(count):
        model = make_model(config, seed, kind)
        fine_tune(model, seed=1000 * (seed + 1) + index, scale=scale)
        models.append(save(f"model_{index}", model))
    return Models(base, tuple(models))


MLP = "model.layers.1.mlp.up_proj.weight"
ATTENTION = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


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


def parameters_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loaded(path: Path) -> PreTrainedModel:
    """A saved model in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def fine_tunes(config: PretrainedConfig, count: int, scale: float = 0.3) -> list[PreTrainedModel]:
    """Models with one base, in memory."""
    models = []
    for seed in range(count):
        models.append(make_model(config))
        fine_tune(models[-1], seed=100 + seed, scale=scale)
    return models
