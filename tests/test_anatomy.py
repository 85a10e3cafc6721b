"""What is found in the parts of every architecture, against what their authors wrote.

An anatomy is compared as text, a line a stage: the units that see one input, what they are, and
how they write to the residual stream. `q k v: linear`, `down: linear -> norm -> 0.25`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_dam.model.anatomy import examine, norm_parts
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.hooks import capture, substitute
from mergekit_dam.model.part import Part, block_part, input_part, output_part
from mergekit_dam.model.units import Anatomy, Unit
from tests.models import ARCHITECTURES, make_model, tiny_llama_config

CPU = torch.device("cpu")

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


def part_and_weights(name: str, make: Callable[[Decoder], Part]) -> tuple[Part, dict[str, Tensor]]:
    """A part of a tiny model with its weights, by relative names; tied ones left out."""
    model = make_model(ARCHITECTURES[name]())
    decoder = Decoder(model.config, CPU)
    part = make(decoder)
    outside = part.prefix == ""
    weights = {
        full.removeprefix(part.prefix): parameter.detach().clone()
        for full, parameter in model.named_parameters()
        if (decoder.block_of(full) is None if outside else full.startswith(part.prefix))
    }
    if outside:
        places = decoder.input_or_output(frozenset(weights))
        weights = {n: w for n, w in weights.items() if places[n] == part.label}
    return part, weights


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


class Scaled(nn.Module):
    """A part with units that are almost linear, norm or embedding, and one that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped = Clipped(4, 4)
        self.shared = nn.Linear(4, 4)
        self.gated = Gated()
        self.once = nn.Linear(4, 4)
        self.minus = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.clipped(x) + self.shared(self.shared(x)) + self.gated(x)
        out: Tensor = 2 * x + self.once(torch.tanh(y)) - 0.5 * self.minus(torch.tanh(y))
        return out


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.5, 0.5)


class Gated(nn.Module):
    """A norm with a third parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.weight * x / x.norm(dim=-1, keepdim=True) + self.gate
        return out


def examined(module: nn.Module) -> Anatomy:
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    x = torch.randn(1, 6, 4)
    return examine(module, lambda: functional_call(module, weights, (x,)), weights, x)


def test_units_that_are_not_of_a_known_form_are_other() -> None:
    """Clipped outputs, a module called twice, a third parameter: averaged, never fitted."""
    torch.manual_seed(0)
    anatomy = examined(Scaled())
    kinds = {unit.name: unit.kind for unit in anatomy.units}
    assert kinds == {
        "clipped": "other",
        "shared": "other",
        "gated": "other",
        "once": "linear",
        "minus": "linear",
    }


def test_scales_of_residual_and_writers_are_measured() -> None:
    torch.manual_seed(0)
    anatomy = examined(Scaled())
    scales = {unit.name: unit.write.scale for unit in anatomy.units if unit.write}
    assert scales == {"once": pytest.approx(1.0), "minus": pytest.approx(-0.5)}
    assert anatomy.residual_scale == pytest.approx(2.0)


def test_a_stream_that_passes_through_a_nonlinearity_has_no_residual() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.tanh(x + self.up(x))
            return out

    anatomy = examined(Through())
    assert anatomy.residual_scale == 0
    assert [unit.write for unit in anatomy.units] == [None]


@pytest.mark.parametrize("bias", [False, True])
def test_norm_parts_rebuild_the_norms_output(bias: bool) -> None:
    norm = nn.LayerNorm(8, bias=bias)
    own = {name: torch.randn(8) for name, _ in norm.named_parameters()}
    x = torch.randn(3, 8)
    at_zero, normalised = norm_parts(norm, x, own)
    rebuilt = at_zero + own["weight"] * normalised + own.get("bias", torch.zeros(8))
    torch.testing.assert_close(rebuilt, functional_call(norm, own, (x,)))
    assert not at_zero.any()


def test_norm_parts_of_gemma_show_the_unit_gain() -> None:
    part, weights = part_and_weights("gemma2", lambda decoder: block_part(decoder, 0))
    x = torch.randn(3, 16)
    own = {"weight": weights["input_layernorm.weight"]}
    at_zero, normalised = norm_parts(part.root.get_submodule("input_layernorm"), x, own)
    torch.testing.assert_close(at_zero, normalised)


def test_captured_tensors_are_copies_from_a_run_that_stops_early() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    ran = []
    module[2].register_forward_hook(lambda *_: ran.append(True))
    x = torch.randn(2, 4)
    with capture(module, inputs=("0",), outputs=("0",)) as captured:
        module(x)
    assert captured.inputs["0"].equal(x)
    assert captured.outputs["0"].equal(module[0](x))
    assert (captured.outputs["0"] < 0).any()
    assert len(ran) == 0


def test_what_goes_wrong_inside_a_capture_is_raised_and_hooks_are_removed() -> None:
    module = nn.Linear(4, 4)
    with pytest.raises(RuntimeError), capture(module, outputs=("",)):
        module(torch.randn(2, 5))
    assert not module._forward_hooks


def test_substituted_units_put_out_copies_of_what_is_known() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    known = torch.randn(2, 4)
    before = known.clone()
    with substitute(module, {"0": known}):
        assert module(torch.zeros(2, 4)).equal(known.relu())
    assert known.equal(before)
    assert not module(torch.zeros(2, 4)).equal(known.relu())


def test_the_tiny_models_examined_are_all_architectures() -> None:
    assert BLOCKS.keys() == ARCHITECTURES.keys()
    assert tiny_llama_config().hidden_size == 16
