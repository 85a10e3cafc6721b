"""Tiny mixtures of experts."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    AfmoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mergekit_dam.model.part import Part, block_part
from tests.kit.models import Models, save_models
from tests.kit.parts import part_and_weights
from tests.kit.texts import save_token_ids

EXPERTS = 4

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
_HEADS: dict[str, Any] = {"head_dim": 8}
_OWN: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": 12}

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "mixtral": partial(MixtralConfig, **_SIZES, num_local_experts=EXPERTS),
    # With an expert that every token is sent to, as far as a gate lets it.
    "qwen2-moe": partial(Qwen2MoeConfig, **_SIZES, **_OWN, shared_expert_intermediate_size=20),
    "qwen3-moe": partial(Qwen3MoeConfig, **_SIZES, **_OWN, **_HEADS, norm_topk_prob=True),
    "olmoe": partial(OlmoeConfig, **_SIZES, num_experts=EXPERTS),
    # Transposed weights, biases, gate and up in turns.
    "gpt-oss": partial(GptOssConfig, **_SIZES, **_HEADS, num_local_experts=EXPERTS),
    # A dense block first; routers with a correction of their scores, which is a buffer.
    "glm4-moe": partial(
        Glm4MoeConfig,
        **_SIZES,
        **_HEADS,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=12,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
}
"""A tiny configuration of mixtures that mergekit defines, or infers."""

FUSED = {"gpt-oss": 1}
"""Input axis of fused weights, where it is not the last."""


def save_mixtures(what: str | PretrainedConfig, folder: Path) -> tuple[Models, list[Path]]:
    """Two models, and token ids for each: Qwen's own tokenizer turns all words into one token."""
    config = CONFIGS[what]() if isinstance(what, str) else what
    models = save_models(folder, config, count=2)
    return models, save_token_ids(folder)


def fused_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of experts, which mergekit writes fused."""
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim == 3}


def afmoe(**sizes: Any) -> PretrainedConfig:
    """mergekit plans its experts one by one; its routers are plain linears."""
    own = {**_SIZES, **_HEADS, **_OWN, "num_dense_layers": 1, "num_shared_experts": 1, **sizes}
    return AfmoeConfig(**own, sliding_window=8, layer_types=["sliding_attention"] * 2)


def block_of(name: str) -> tuple[Part, dict[str, Tensor]]:
    """The last block of a tiny model, and its weights by relative names."""
    return part_and_weights(CONFIGS[name](), lambda decoder: block_part(decoder, 1))
