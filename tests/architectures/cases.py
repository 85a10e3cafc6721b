"""The architectures under test: a tiny random model of each.

mergekit 0.1.5 defines some architectures, and infers others from the class in transformers.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.kit.models import ARCHITECTURES, VOCAB_SIZE

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
    """What makes a configuration as small as its class has names for sizes."""
    mapped = kind.attribute_map  # names that stand for others: one of the two is enough
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    names = {*(field.name for field in fields), *signature(kind.__init__).parameters, *mapped}
    own = {name: size for name, size in _SIZES.items() if name in names}
    return {**{n: size for n, size in own.items() if mapped.get(n) not in own}, **others}


def tiny(kind: type[tf.PretrainedConfig], **others: Any) -> Callable[[], tf.PretrainedConfig]:
    """Makes a tiny configuration."""
    return lambda: kind(**sizes(kind, **others))


@dataclass(frozen=True)
class Case:
    """A tiny model of an architecture.

    Attributes:
        title: in the README.
        averaged: what is not fitted -> a regular expression of the names of its tensors.
        kind: the class of the model, where it is not the one that transformers has for causal
            language models.
        stored: changes the tensors of a saved model to what the Hub has.
        refused: a regular expression of what dam says where it refuses the architecture.
    """

    title: str
    config: Callable[[], tf.PretrainedConfig]
    averaged: Mapping[str, str] = field(default_factory=dict)
    kind: type[tf.PreTrainedModel] | None = None
    stored: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    refused: str | None = None


EXPERTS = "experts"
ROUTER_BIAS = "biases of routers and experts"
STATES = "states, convolutions, activations"
HEAD_BIAS = "bias of the head"
VISION = "all that sees images"
BUFFERS = "buffers of transformers 4"
POSITIONS = "positions"
QK_NORMS = "norms of q and k"
OUTSIDE = (VISION, BUFFERS)
"""What is outside of the decoder."""

_ROUTER_BIAS = {ROUTER_BIAS: r"e_score_correction_bias$"}
_MAMBA = {
    STATES: r"\.(A_log|D|dt_bias|conv1d\.(weight|bias)|dt_proj\.(weight|bias)|mamba\.norm\.weight)$"
}

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


def _as_pythia(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers that transformers 4 saved, and mergekit's definition asks for."""
    for layer in range(2):
        name = f"gpt_neox.layers.{layer}.attention."
        tensors[name + "bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        tensors[name + "masked_bias"] = torch.tensor(-1e9)
        tensors[name + "rotary_emb.inv_freq"] = torch.ones(1)
    return tensors


def _as_falcon_40b(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied head that is saved nevertheless."""
    return {**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}


def _as_gemma_3(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower by its name of transformers 4."""
    old = "vision_tower.vision_model."
    return {re.sub(r"^vision_tower\.", old, name): t for name, t in tensors.items()}


NO_DECODER = r"required a causal language model"
_MISSING = r"required the same tensors in all models"


def _class(title: str) -> str:
    """What transformers' classes of an architecture begin with."""
    return title.replace("RoBERT", "Robert").replace("BERT", "Bert").replace("-", "")


CASES: dict[str, Case] = {
    # Defined by mergekit
    "afmoe": Case("AFMoE", tiny(tf.AfmoeConfig), {ROUTER_BIAS: "expert_bias"}),
    "apertus": Case("Apertus", tiny(tf.ApertusConfig), {STATES: r"act_fn"}),
    "arcee": Case("Arcee", tiny(tf.ArceeConfig)),
    "cohere": Case("Cohere", ARCHITECTURES["cohere"], refused=_MISSING),
    "cohere-qk-norms": Case(
        "Cohere with q/k norms", tiny(tf.CohereConfig, use_qk_norm=True), {QK_NORMS: r"[qk]_norm"}
    ),
    "cohere2": Case("Cohere 2", tiny(tf.Cohere2Config, sliding_window_pattern=2)),
    "falcon": Case("Falcon", ARCHITECTURES["falcon"], refused=_MISSING),
    "falcon-40b": Case("Falcon 40B as on the Hub", ARCHITECTURES["falcon"], stored=_as_falcon_40b),
    "gemma": Case("Gemma", tiny(tf.GemmaConfig)),
    "gemma2": Case("Gemma 2", ARCHITECTURES["gemma2"]),
    "gemma3": Case("Gemma 3", ARCHITECTURES["gemma3"]),
    "glm4": Case("GLM 4", tiny(tf.Glm4Config)),
    "glm4-moe": Case("GLM 4 MoE", tiny(tf.Glm4MoeConfig), _ROUTER_BIAS),
    "gpt-bigcode": Case("GPT-BigCode", tiny(tf.GPTBigCodeConfig)),
    "gpt-neox": Case("GPT-NeoX", ARCHITECTURES["gpt-neox"], refused=_MISSING),
    "pythia": Case(
        "GPT-NeoX as on the Hub",
        ARCHITECTURES["gpt-neox"],
        {BUFFERS: r"attention\.(masked_)?bias|inv_freq"},
        stored=_as_pythia,
    ),
    "gpt2": Case("GPT-2", ARCHITECTURES["gpt2"]),
    "granite": Case("Granite", ARCHITECTURES["granite"]),
    "granite4": Case(
        "Granite 4 (hybrid)",
        tiny(tf.GraniteMoeHybridConfig, layer_types=["mamba", "attention"]),
        _MAMBA,
    ),
    "lfm2": Case(
        "LFM2",
        tiny(tf.Lfm2Config, layer_types=["conv", "full_attention"]),
        {STATES: r"conv\.conv\.weight"},
    ),
    "llama": Case("Llama", ARCHITECTURES["llama"]),
    "llama-tied": Case("Llama", ARCHITECTURES["llama-tied"]),
    "mamba": Case("Mamba", tiny(tf.MambaConfig), _MAMBA),
    "mistral": Case("Mistral", ARCHITECTURES["mistral"]),
    "mixtral": Case("Mixtral", ARCHITECTURES["mixtral"]),
    "olmo2": Case("OLMo 2", ARCHITECTURES["olmo2"]),
    "phi": Case("Phi", ARCHITECTURES["phi"], {HEAD_BIAS: r"lm_head\.bias"}),
    "phi3": Case("Phi 3", ARCHITECTURES["phi3"]),
    "qwen2": Case("Qwen 2", ARCHITECTURES["qwen2"]),
    "qwen3": Case("Qwen 3", ARCHITECTURES["qwen3"]),
    "qwen3-moe": Case("Qwen 3 MoE", tiny(tf.Qwen3MoeConfig)),
    "stablelm": Case("StableLM", ARCHITECTURES["stablelm"]),
    "starcoder2": Case("StarCoder 2", ARCHITECTURES["starcoder2"]),
    # Inferred by mergekit
    "bloom": Case("Bloom", ARCHITECTURES["bloom"]),
    "deepseek-v3": Case("DeepSeek V3", tiny(tf.DeepseekV3Config), _ROUTER_BIAS),
    "exaone4": Case("Exaone 4", tiny(tf.Exaone4Config)),
    "falcon-h1": Case("Falcon-H1", tiny(tf.FalconH1Config), _MAMBA),
    "glm": Case("GLM", tiny(tf.GlmConfig)),
    "gpt-j": Case("GPT-J", tiny(tf.GPTJConfig), {HEAD_BIAS: r"lm_head\.bias"}),
    "gpt-oss": Case(
        "GPT-OSS",
        tiny(tf.GptOssConfig),
        {ROUTER_BIAS: r"_proj_bias$|router\.bias", STATES: r"\.sinks$"},
    ),
    "granite-moe": Case("Granite MoE", tiny(tf.GraniteMoeConfig)),
    "helium": Case("Helium", tiny(tf.HeliumConfig)),
    "jamba": Case(
        "Jamba",
        tiny(
            tf.JambaConfig,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            use_mamba_kernels=False,
        ),
        _MAMBA,
    ),
    "llama4-text": Case("Llama 4 text", tiny(tf.Llama4TextConfig), {EXPERTS: r"\.experts\."}),
    "mpt": Case("MPT", tiny(tf.MptConfig)),
    "nemotron": Case("Nemotron", tiny(tf.NemotronConfig)),
    "olmo": Case("OLMo", tiny(tf.OlmoConfig)),
    "olmo3": Case("OLMo 3", tiny(tf.Olmo3Config)),
    "olmoe": Case("OLMoE", tiny(tf.OlmoeConfig)),
    "opt": Case("OPT", tiny(tf.OPTConfig), {POSITIONS: "embed_positions"}),
    "phimoe": Case("Phi-MoE", tiny(tf.PhimoeConfig)),
    "qwen2-moe": Case(
        "Qwen 2 MoE",
        tiny(tf.Qwen2MoeConfig),
    ),
    "qwen3-next": Case(
        "Qwen3-Next",
        tiny(tf.Qwen3NextConfig, layer_types=["linear_attention", "full_attention"]),
        {STATES: r"linear_attn\.(A_log|dt_bias|conv1d|norm)"},
    ),
    "recurrent-gemma": Case(
        "RecurrentGemma",
        tiny(tf.RecurrentGemmaConfig, block_types=["recurrent", "attention"]),
        {STATES: r"rg_lru|conv_1d"},
    ),
    "seed-oss": Case("Seed-OSS", tiny(tf.SeedOssConfig)),
    "smollm3": Case("SmolLM3", tiny(tf.SmolLM3Config)),
    # Vision-language models
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
        refused="where transformers 5 has none",
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
    # Refused: blocks hand on more than hidden states
    "gemma3n": Case(
        "Gemma 3n",
        tiny(
            tf.Gemma3nTextConfig,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=4,
            intermediate_size=[24] * 4,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        refused="one hidden state a token",
    ),
    "gemma4": Case(
        "Gemma 4",
        tiny(
            tf.Gemma4TextConfig,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=4,
        ),
        refused="depends on the text",
    ),
    "gemma4-unified": Case(
        "Gemma 4 unified", tiny(tf.Gemma4UnifiedTextConfig), refused="can leave something"
    ),
    "roformer": Case(
        "RoFormer", tiny(tf.RoFormerConfig, is_decoder=True), refused="weights outside"
    ),
    "rwkv": Case("RWKV", tiny(tf.RwkvConfig), refused="cannot run one by one"),
    "xlstm": Case("xLSTM", tiny(tf.xLSTMConfig), refused="cannot run one by one"),
    # Refused: no causal decoder
    "t5": Case(
        "T5",
        partial(tf.T5Config, vocab_size=VOCAB_SIZE, d_model=16, d_ff=24, num_layers=1, num_heads=2),
        kind=tf.T5ForConditionalGeneration,
        refused=NO_DECODER,
    ),
    "whisper": Case(
        "Whisper",
        tiny(
            tf.WhisperConfig,
            encoder_layers=1,
            encoder_attention_heads=2,
            decoder_layers=1,
            decoder_attention_heads=2,
        ),
        kind=tf.WhisperForConditionalGeneration,
        refused=NO_DECODER,
    ),
    **{
        f"{name.lower()}-{task.lower()}": Case(
            name,
            tiny(getattr(tf, f"{_class(name)}Config")),
            kind=getattr(tf, f"{_class(name)}{task}"),
            refused=NO_DECODER,
        )
        for name, tasks in {
            "BERT": ("Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice"),
            "DistilBERT": ("Model", "ForMaskedLM", "ForSequenceClassification"),
            "RoBERTa": ("Model", "ForMaskedLM", "ForSequenceClassification"),
        }.items()
        for task in (*tasks, "ForTokenClassification")
    },
    **{
        f"{name.lower()}-classifier": Case(
            f"{name} classifiers",
            ARCHITECTURES[_class(name).lower()],
            kind=getattr(tf, f"{_class(name)}ForSequenceClassification"),
            refused=NO_DECODER,
        )
        for name in ("Llama", "GPT-2")
    },
}

MERGED = [name for name, case in CASES.items() if case.refused is None]
REFUSED = [name for name, case in CASES.items() if case.refused is not None]
