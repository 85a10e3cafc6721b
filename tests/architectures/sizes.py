"""Tiny configurations of any class of transformers."""

import dataclasses
from collections.abc import Callable
from inspect import signature
from typing import Any

import transformers as tf

from tests.kit.models import VOCAB_SIZE

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "hidden_size": 16,
    "d_model": 16,
    "n_embd": 16,
    "word_embed_proj_dim": 16,
    "intermediate_size": 24,
    "n_inner": 24,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 4,
    # mixtures of experts
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # low-rank attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "rotary_dim": 4,
    # states
    "state_size": 4,
    "time_step_rank": 4,
    "lru_width": 16,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_d_ssm": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""Sizes by transformers' names for them."""


def sizes(kind: type[tf.PretrainedConfig], **others: Any) -> dict[str, Any]:
    """Small values for all sizes that a class of configurations has names for."""
    mapped = kind.attribute_map  # names that stand for others: one of the two is enough
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    names = {*(field.name for field in fields), *signature(kind.__init__).parameters, *mapped}
    own = {name: size for name, size in _SIZES.items() if name in names}
    return {**{n: size for n, size in own.items() if mapped.get(n) not in own}, **others}


def tiny(kind: type[tf.PretrainedConfig], **others: Any) -> Callable[[], tf.PretrainedConfig]:
    """Makes a tiny configuration."""
    return lambda: kind(**sizes(kind, **others))
