"""Language models that mergekit defines, or infers from the class in transformers."""

import torch
import transformers as tf
from torch import Tensor

from tests.architectures.case import (
    BUFFERS,
    EXPERTS,
    HEAD_BIAS,
    MISSING,
    POSITIONS,
    QK_NORMS,
    ROUTER_BIAS,
    STATES,
    Case,
)
from tests.architectures.sizes import tiny
from tests.kit.models import ARCHITECTURES

_ROUTER_BIAS = {ROUTER_BIAS: r"e_score_correction_bias$"}
_MAMBA = {
    STATES: r"\.(A_log|D|dt_bias|conv1d\.(weight|bias)|dt_proj\.(weight|bias)|mamba\.norm\.weight)$"
}


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


DEFINED: dict[str, Case] = {
    "afmoe": Case("AFMoE", tiny(tf.AfmoeConfig), {ROUTER_BIAS: "expert_bias"}),
    "apertus": Case("Apertus", tiny(tf.ApertusConfig), {STATES: r"act_fn"}),
    "arcee": Case("Arcee", tiny(tf.ArceeConfig)),
    "cohere": Case("Cohere", ARCHITECTURES["cohere"], refused=MISSING),
    "cohere-qk-norms": Case(
        "Cohere with q/k norms", tiny(tf.CohereConfig, use_qk_norm=True), {QK_NORMS: r"[qk]_norm"}
    ),
    "cohere2": Case("Cohere 2", tiny(tf.Cohere2Config, sliding_window_pattern=2)),
    "falcon": Case("Falcon", ARCHITECTURES["falcon"], refused=MISSING),
    "falcon-40b": Case("Falcon 40B as on the Hub", ARCHITECTURES["falcon"], stored=_as_falcon_40b),
    "gemma": Case("Gemma", tiny(tf.GemmaConfig)),
    "gemma2": Case("Gemma 2", ARCHITECTURES["gemma2"]),
    "gemma3": Case("Gemma 3", ARCHITECTURES["gemma3"]),
    "glm4": Case("GLM 4", tiny(tf.Glm4Config)),
    "glm4-moe": Case("GLM 4 MoE", tiny(tf.Glm4MoeConfig), _ROUTER_BIAS),
    "gpt-bigcode": Case("GPT-BigCode", tiny(tf.GPTBigCodeConfig)),
    "gpt-neox": Case("GPT-NeoX", ARCHITECTURES["gpt-neox"], refused=MISSING),
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
}

INFERRED: dict[str, Case] = {
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
}
