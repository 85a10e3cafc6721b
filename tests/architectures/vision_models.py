"""Vision-language models: their language model is fitted."""

import re
from functools import partial
from typing import Any

import transformers as tf
from torch import Tensor

from tests.architectures.case import (
    EXPERTS,
    VISION,
    Case,
)
from tests.architectures.sizes import sizes

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 58,
    "vision_end_token_id": 59,
}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _as_gemma_3(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower by its name of transformers 4."""
    old = "vision_tower.vision_model."
    return {re.sub(r"^vision_tower\.", old, name): t for name, t in tensors.items()}


VISION_MODELS: dict[str, Case] = {
    "gemma3-vl": Case(
        "Gemma 3 (vision) as on the Hub",
        partial(
            tf.Gemma3Config,
            text_config=sizes(tf.Gemma3TextConfig),
            vision_config={**_VISION, "vision_use_head": False},
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
            mm_tokens_per_image=4,
        ),
        {VISION: "vision|projector"},
        tf.Gemma3ForConditionalGeneration,
        _as_gemma_3,
    ),
    "idefics3": Case(
        "Idefics 3",
        partial(
            tf.Idefics3Config,
            text_config=sizes(tf.LlamaConfig),
            vision_config=_VISION,
            image_token_id=60,
            scale_factor=2,
        ),
        {VISION: "vision|connector"},
        tf.Idefics3ForConditionalGeneration,
    ),
    "internvl": Case(
        "InternVL",
        partial(
            tf.InternVLConfig,
            text_config=sizes(tf.Qwen2Config),
            vision_config=_VISION,
            image_token_id=60,
        ),
        {VISION: "vision|projector"},
        tf.InternVLForConditionalGeneration,
    ),
    "llava": Case(
        "LLaVA",
        partial(
            tf.LlavaConfig,
            text_config=sizes(tf.LlamaConfig),
            vision_config=tf.CLIPVisionConfig(**_VISION),
            image_token_index=60,
        ),
        {VISION: "vision|projector"},
        tf.LlavaForConditionalGeneration,
    ),
    "mistral3": Case(
        "Mistral 3",
        partial(
            tf.Mistral3Config,
            text_config=sizes(tf.MistralConfig),
            vision_config={"model_type": "pixtral", **_VISION},
            image_token_index=60,
        ),
        {VISION: "vision|projector"},
        tf.Mistral3ForConditionalGeneration,
    ),
    "paligemma": Case(
        "PaliGemma",
        partial(
            tf.PaliGemmaConfig,
            text_config=sizes(tf.GemmaConfig),
            vision_config=tf.SiglipVisionConfig(**{**_VISION, "projection_dim": 16}),
            image_token_index=60,
            projection_dim=16,
        ),
        {VISION: "vision|projector"},
        tf.PaliGemmaForConditionalGeneration,
    ),
    "qwen2-vl": Case(
        "Qwen 2 VL",
        partial(
            tf.Qwen2VLConfig,
            text_config=sizes(tf.Qwen2Config, rope_parameters=_QWEN_ROPE),
            vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
            **_QWEN_TOKENS,
        ),
        kind=tf.Qwen2VLForConditionalGeneration,
        refused="but transformers 5 has no such entry",
    ),
    "qwen2.5-vl": Case(
        "Qwen 2.5 VL",
        partial(
            tf.Qwen2_5_VLConfig,
            text_config=sizes(tf.Qwen2Config, rope_parameters=_QWEN_ROPE),
            vision_config=_QWEN_VISION,
            **_QWEN_TOKENS,
        ),
        {VISION: "visual"},
        tf.Qwen2_5_VLForConditionalGeneration,
    ),
    "qwen3-vl": Case(
        "Qwen 3 VL",
        partial(
            tf.Qwen3VLConfig,
            text_config=sizes(tf.Qwen3Config, rope_parameters=_QWEN_ROPE),
            vision_config={
                **_QWEN_VISION,
                "deepstack_visual_indexes": [0, 1, 1],
                "num_position_embeddings": 16,
            },
            **_QWEN_TOKENS,
        ),
        {VISION: "visual"},
        tf.Qwen3VLForConditionalGeneration,
    ),
    "qwen3-vl-moe": Case(
        "Qwen 3 VL MoE",
        partial(
            tf.Qwen3VLMoeConfig,
            text_config=sizes(tf.Qwen3MoeConfig, rope_parameters=_QWEN_ROPE),
            vision_config={
                **_QWEN_VISION,
                "deepstack_visual_indexes": [0, 1, 1],
                "num_position_embeddings": 16,
            },
            **_QWEN_TOKENS,
        ),
        {VISION: "visual"},
        tf.Qwen3VLMoeForConditionalGeneration,
    ),
    "llama4": Case(
        "Llama 4",
        partial(
            tf.Llama4Config,
            text_config=sizes(tf.Llama4TextConfig),
            vision_config={
                **_VISION,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            image_token_index=60,
        ),
        {VISION: "vision|projector", EXPERTS: r"\.experts\."},
        tf.Llama4ForConditionalGeneration,
    ),
}
