"""The parts of every architecture, against what their authors wrote.

An anatomy is compared as text, one line per group: the units that share an input, their kind, and
how they write to the residual stream. `q k v: linear`, `down: linear -> norm -> 0.25`.
"""

import pytest
import torch

from mergekit_dam.model.part import block_part, input_part, output_part
from mergekit_dam.model.units import Anatomy, Unit
from tests.kit.models import ARCHITECTURES, tiny_llama_config
from tests.kit.parts import part_and_weights

LLAMA = """
input_layernorm: norm
self_attn.q_proj self_attn.k_proj self_attn.v_proj: linear
self_attn.o_proj: linear -> 1.0
post_attention_layernorm: norm
mlp.gate_proj mlp.up_proj: linear
mlp.down_proj: linear -> 1.0
"""
QK_NORMS = """
self_attn.q_norm: norm
self_attn.k_norm: norm
"""
GEMMA2 = """
input_layernorm: norm +1
self_attn.q_proj self_attn.k_proj self_attn.v_proj: linear
self_attn.o_proj: linear -> post_attention_layernorm -> 1.0
post_attention_layernorm: norm +1 -> 1.0
pre_feedforward_layernorm: norm +1
mlp.gate_proj mlp.up_proj: linear
mlp.down_proj: linear -> post_feedforward_layernorm -> 1.0
post_feedforward_layernorm: norm +1 -> 1.0
"""
PARALLEL_BLOOM = """
self_attention.query_key_value: linear
self_attention.dense: linear -> 1.0
mlp.dense_h_to_4h: linear
mlp.dense_4h_to_h: linear -> 1.0
"""


def after(text: str, unit: str, more: str) -> str:
    """The text with lines put behind that of a unit."""
    lines = text.strip().splitlines()
    at = next(i for i, line in enumerate(lines) if unit in line) + 1
    return "\n".join([*lines[:at], *more.strip().splitlines(), *lines[at:]])


BLOCKS = {
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "stablelm": LLAMA,
    "granite": LLAMA.replace("-> 1.0", "-> 0.25"),
    "qwen3": after(LLAMA, "v_proj", QK_NORMS),
    "starcoder2": LLAMA.replace("mlp.gate_proj mlp.up_proj", "mlp.c_fc").replace(
        "mlp.down_proj", "mlp.c_proj"
    ),
    "phi3": LLAMA.replace(
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.qkv_proj"
    ).replace("mlp.gate_proj mlp.up_proj", "mlp.gate_up_proj"),
    "gemma2": GEMMA2,
    "gemma3": after(GEMMA2, "v_proj", QK_NORMS.replace("norm\n", "norm +1\n")),
    "olmo2": """
self_attn.q_proj self_attn.k_proj self_attn.v_proj: linear
self_attn.q_norm: norm
self_attn.k_norm: norm
self_attn.o_proj: linear -> post_attention_layernorm -> 1.0
post_attention_layernorm: norm -> 1.0
mlp.gate_proj mlp.up_proj: linear
mlp.down_proj: linear -> post_feedforward_layernorm -> 1.0
post_feedforward_layernorm: norm -> 1.0
""",
    "gpt2": """
ln_1: norm
attn.c_attn: linear transposed
attn.c_proj: linear transposed -> 1.0
ln_2: norm
mlp.c_fc: linear transposed
mlp.c_proj: linear transposed -> 1.0
""",
    "gpt-neox": """
input_layernorm: norm
attention.query_key_value: linear
attention.dense: linear -> 1.0
post_attention_layernorm: norm
mlp.dense_h_to_4h: linear
mlp.dense_4h_to_h: linear -> 1.0
""",
    "falcon": "ln_attn: norm\nln_mlp: norm" + PARALLEL_BLOOM,
    "bloom": after(
        "input_layernorm: norm" + PARALLEL_BLOOM, ".dense:", "post_attention_layernorm: norm"
    ),
    # Attention and MLP side by side, from one norm.
    "cohere": """
input_layernorm: norm
self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj: linear
self_attn.o_proj: linear -> 1.0
mlp.down_proj: linear -> 1.0
""",
    "phi": """
input_layernorm: norm
self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1: linear
self_attn.dense: linear -> 1.0
mlp.fc2: linear -> 1.0
""",
    "mixtral": """
input_layernorm: norm
self_attn.q_proj self_attn.k_proj self_attn.v_proj: linear
self_attn.o_proj: linear -> 1.0
post_attention_layernorm: norm
mlp.gate: router
mlp.experts: experts -> 1.0
""",
}
ENDS = {
    "llama": ("model.embed_tokens: embedding", "model.norm: norm\nlm_head: linear"),
    "llama-tied": ("model.embed_tokens: embedding", "model.norm: norm"),
    "gpt2": ("transformer.wte: embedding\ntransformer.wpe: embedding", "transformer.ln_f: norm"),
    "gemma2": ("model.embed_tokens: embedding", "model.norm: norm +1"),
    "bloom": (
        "transformer.word_embeddings: embedding\ntransformer.word_embeddings_layernorm: norm",
        "transformer.ln_f: norm",
    ),
    "granite": ("model.embed_tokens: embedding", "model.norm: norm\nlm_head: linear"),
    "phi": ("model.embed_tokens: embedding", "model.final_layernorm: norm\nlm_head: linear"),
}


def describe(anatomy: Anatomy) -> str:
    return "\n".join(_stage(stage) for stage in anatomy.groups)


def _stage(stage: tuple[Unit, ...]) -> str:
    (what,) = {_unit(unit) for unit in stage}
    return f"{' '.join(unit.name for unit in stage)}: {what}"


def _unit(unit: Unit) -> str:
    axis = {-1: "", 0: " transposed"}[unit.axis]
    gain = {0.0: "", 1.0: " +1"}[unit.unit_gain]
    write = ""
    if unit.write:
        through = f" -> {unit.write.through}" if unit.write.through else ""
        write = f"{through} -> {round(unit.write.scale, 4)}"
    return f"{unit.kind}{axis}{gain}{write}"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("index", [0, 1])
def test_blocks_are_what_their_authors_wrote(name: str, index: int) -> None:
    part, weights = part_and_weights(name, lambda decoder: block_part(decoder, index))
    anatomy = part.anatomy(weights, torch.zeros(1, 2, 16))
    assert describe(anatomy) == BLOCKS[name].strip()
    assert anatomy.residual_scale == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ENDS)
def test_input_and_output_are_what_their_authors_wrote(name: str) -> None:
    entering = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 16))
    for make, like, expected in zip((input_part, output_part), entering, ENDS[name], strict=True):
        part, weights = part_and_weights(name, make)
        anatomy = part.anatomy(weights, like)
        assert describe(anatomy) == expected
        assert anatomy.residual_scale == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "cohere", "gpt-neox", "falcon"])
@pytest.mark.parametrize("kind", ["equal norms", "zero writers", "all zero"])
def test_weights_that_coincide_or_vanish_do_not_confuse_it(name: str, kind: str) -> None:
    """Freshly initialised models: all norms one, all biases zero, writers zero."""
    part, weights = part_and_weights(name, lambda decoder: block_part(decoder, 0))
    for weight in weights.values():
        if kind == "all zero":
            weight.zero_()
        elif kind == "equal norms" and weight.ndim == 1:
            weight.fill_(weight.mean().round())
        elif kind == "zero writers" and weight.ndim == 2 and weight.shape[0] == 16:
            weight.zero_()
    anatomy = part.anatomy(weights, torch.zeros(1, 2, 16))
    assert describe(anatomy) == BLOCKS[name].strip()


@pytest.mark.parametrize("name", ["llama", "granite", "olmo2", "cohere"])
@pytest.mark.parametrize("large", ["o_proj", "down_proj"])
def test_a_writer_far_larger_than_another_does_not_hide_it(name: str, large: str) -> None:
    """Some blocks add thousands to a few channels, where others add hundredths."""
    part, weights = part_and_weights(name, lambda decoder: block_part(decoder, 0))
    for full, weight in weights.items():
        if large in full:
            weight.mul_(1e5)
    anatomy = part.anatomy(weights, torch.zeros(1, 2, 16))
    assert describe(anatomy) == BLOCKS[name].strip()
    assert anatomy.residual_scale == pytest.approx(1.0, rel=1e-2)


def test_anatomy_does_not_depend_on_what_enters_but_on_its_width() -> None:
    part, weights = part_and_weights("llama", lambda decoder: block_part(decoder, 0))
    assert part.anatomy(weights, torch.zeros(1, 2, 16)) == part.anatomy(
        weights, torch.randn(1, 9, 16)
    )


def test_examining_changes_no_weights_and_leaves_no_hooks() -> None:
    part, weights = part_and_weights("olmo2", lambda decoder: block_part(decoder, 0))
    before = {name: weight.clone() for name, weight in weights.items()}
    part.anatomy(weights, torch.zeros(1, 2, 16))
    assert all(weights[name].equal(weight) for name, weight in before.items())
    for module in part.root.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_writers_before_a_stage_are_those_that_add_to_the_stream_themselves() -> None:
    part, weights = part_and_weights("gemma2", lambda decoder: block_part(decoder, 0))
    anatomy = part.anatomy(weights, torch.zeros(1, 2, 16))
    assert [unit.name for unit in anatomy.writers_before(2)] == []
    assert [unit.name for unit in anatomy.writers_before(6)] == ["post_attention_layernorm"]
    assert [unit.name for unit in anatomy.units][:2] == ["input_layernorm", "self_attn.q_proj"]


def test_the_tiny_models_examined_are_all_architectures() -> None:
    assert BLOCKS.keys() == ARCHITECTURES.keys()
    assert tiny_llama_config().hidden_size == 16
