"""Models run in parts, against the same models run whole."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    Gemma3nTextConfig,
    PretrainedConfig,
    RwkvConfig,
    T5Config,
)

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.probe import input_or_output, make_decoder
from tests.kit.models import ARCHITECTURES, VOCAB_SIZE, make_model, tiny_llama_config, weights_of
from tests.kit.parts import of_block, streamed
from tests.kit.tensors import CPU, tokens_of

TIED = ("llama-tied", "gpt2", "gemma2", "gemma3", "falcon", "bloom", "cohere", "starcoder2")


def decoder_of(config: PretrainedConfig) -> Decoder:
    return make_decoder(config, CPU)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_parts_equal_the_whole_model_exactly(name: str) -> None:
    """Lengths beyond the sliding windows; several batch sizes from one decoder."""
    model = make_model(ARCHITECTURES[name]())
    decoder, weights = decoder_of(model.config), weights_of(model)
    for batch, length in ((3, 12), (1, 12), (2, 5)):
        tokens = tokens_of(0, batch, length)
        with torch.no_grad():
            whole = model(tokens, use_cache=False).logits
        assert (streamed(decoder, weights, tokens) - whole).abs().max() == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_decoder_holds_no_weights(name: str) -> None:
    model = decoder_of(ARCHITECTURES[name]()).model
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} <= {"cpu"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_acts_in_one_place(name: str) -> None:
    decoder = decoder_of(ARCHITECTURES[name]())
    names = [n for n, _ in decoder.model.named_parameters()]
    outside = frozenset(n for n in names if decoder.names.block_of(n) is None)
    parts = input_or_output(decoder, outside)
    assert parts.keys() == outside
    for full, part in parts.items():
        at_the_end = "final" in full or "lm_head" in full or full.split(".")[1] in ("norm", "ln_f")
        assert part == ("output" if at_the_end else "input"), full
    for index, block in enumerate(decoder.blocks):
        own = {n for n in names if decoder.names.block_of(n) == index}
        prefix = f"{decoder.names.block_name(index)}."
        assert {n for n, _ in block.named_parameters()} == {n.removeprefix(prefix) for n in own}
    assert len(decoder.blocks) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_is_found_and_known_to_be_tied_or_not(name: str) -> None:
    decoder = decoder_of(ARCHITECTURES[name]())
    assert decoder.head_name == "lm_head"
    tied = decoder.names.canonical("lm_head.weight") != "lm_head.weight"
    assert tied == (name in TIED)


def test_parts_of_names_that_no_forward_uses_are_absent() -> None:
    decoder = decoder_of(tiny_llama_config())
    names = frozenset({"model.embed_tokens.weight", "model.norm.weight", "model.rotary.weight"})
    assert input_or_output(decoder, names) == {
        "model.embed_tokens.weight": "input",
        "model.norm.weight": "output",
    }


def test_the_place_of_a_parameter_follows_from_its_name() -> None:
    decoder = decoder_of(tiny_llama_config(tie_word_embeddings=True))
    assert decoder.names.canonical("lm_head.weight") == "model.embed_tokens.weight"
    assert decoder.names.canonical("model.norm.weight") == "model.norm.weight"
    assert decoder.names.canonical("model.other.weight") is None
    assert decoder.names.block_of("model.layers.1.mlp.up_proj.weight") == 1
    assert decoder.names.block_of("model.layers.x.weight") is None
    assert decoder.names.block_of("model.layersnorm.weight") is None
    assert decoder.names.block_name(1) == "model.layers.1"


def test_a_block_runs_on_hidden_states_of_any_content_and_keeps_them() -> None:
    model = make_model(tiny_llama_config())
    decoder = decoder_of(model.config)
    hidden = torch.randn(2, 6, 16)
    before = hidden.clone()
    with torch.no_grad():
        out = decoder.run_block(0, of_block(decoder, 0, weights_of(model)), hidden)
    assert out.shape == hidden.shape
    assert hidden.equal(before)


def test_running_parts_leaves_the_module_tree_as_it_was() -> None:
    model = make_model(tiny_llama_config())
    decoder = decoder_of(model.config)
    streamed(decoder, weights_of(model), tokens_of(0, 3))
    assert not any("forward" in vars(module) for module in decoder.model.modules())
    assert {p.device.type for p in decoder.model.parameters()} == {"meta"}


def test_gradients_flow_to_the_weights_handed_in() -> None:
    model = make_model(tiny_llama_config())
    decoder, weights = decoder_of(model.config), weights_of(model)
    head = weights["lm_head.weight"].clone().requires_grad_()
    hidden = torch.randn(1, 4, 16)
    decoder.logits({**weights, "lm_head.weight": head}, hidden).sum().backward()
    assert head.grad is not None
    assert head.grad.any()


def test_moving_takes_buffers_along_and_forgets_recorded_calls() -> None:
    decoder = decoder_of(tiny_llama_config())
    hidden, weights = torch.randn(1, 4, 16), weights_of(make_model(tiny_llama_config()))
    with torch.no_grad():
        decoder.run_block(0, of_block(decoder, 0, weights), hidden)
    decoder.move(torch.device("meta"))
    assert {buffer.device.type for buffer in decoder.model.buffers()} == {"meta"}
    assert decoder._calls.cache_info().currsize == 0
    decoder.move(torch.device("meta"))  # nothing to do


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_moved_decoder_runs_on_its_new_device(name: str) -> None:
    device = torch.device("cuda:0")
    model = make_model(ARCHITECTURES[name]())
    decoder = decoder_of(model.config)
    streamed(decoder, weights_of(model), tokens_of(0, 3))
    decoder.move(device)
    tokens = tokens_of(0, 3).to(device)
    nn.Module.to(model, device)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
    assert (streamed(decoder, weights_of(model), tokens) - whole).abs().max() == 0


def test_blocks_that_are_handed_more_than_hidden_states_are_refused() -> None:
    """Gemma 3n hands every block embeddings of the tokens, beside the hidden states."""
    config = Gemma3nTextConfig(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=16,
        hidden_size_per_layer_input=8,
        intermediate_size=[24] * 4,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        laurel_rank=4,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0,
    )
    with pytest.raises(
        ArchitectureError, match=r"one hidden state per token before .* Gemma3n.*\[4, 1, 2, 16\]"
    ):
        decoder_of(config)


def test_blocks_that_return_more_than_hidden_states_are_refused() -> None:
    """RWKV's blocks hand a recurrent state on, beside the hidden states."""
    config = RwkvConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2)
    with pytest.raises(ArchitectureError, match=r"blocks of Rwkv.* cannot run one by one"):
        decoder_of(config)


def test_a_model_without_one_list_of_blocks_is_refused() -> None:
    """Bart's causal model keeps its layers in a list of another length than the config says."""
    config = BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
    )
    with pytest.raises(
        ArchitectureError, match=r"required one list of 3 decoder blocks .* found 0"
    ):
        decoder_of(config)


def test_a_model_that_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="builds no causal language model"):
        decoder_of(T5Config(vocab_size=VOCAB_SIZE, d_model=16, num_layers=1))
