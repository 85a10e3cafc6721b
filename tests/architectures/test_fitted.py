"""Architectures that dam fits: a whole merge of each, and the result."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mergekit_dam.coefficients.file import FILE_NAME, CoefficientFile
from mergekit_dam.model.build import build_model
from mergekit_dam.model.names import WeightNames
from mergekit_dam.model.probe import make_decoder
from tests.architectures.case import OUTSIDE
from tests.architectures.cases import CASES, MERGED
from tests.architectures.seen import Seen, merged_of, unfound
from tests.architectures.table import LOST, written_table
from tests.kit.merging import dam, merge, tensors_of
from tests.kit.models import logits_of, make_model, weights_of
from tests.kit.parts import of_block
from tests.kit.tensors import CPU

MAY_KEEP_START = {"other", "bias", "head", "router", "experts"}
"""Kinds that there may be one tensor of, or little text for."""


@pytest.mark.parametrize("name", MERGED)
def test_blocks_run_one_by_one_equal_the_whole_model_exactly(name: str) -> None:
    """Two texts go through a block before the next block runs, as in a fit."""
    case = CASES[name]
    model = make_model(case.config(), kind=case.kind)
    model.config.architectures = [type(model).__name__]  # as it is saved
    decoder, weights = make_decoder(model.config, CPU), weights_of(model)
    outside = {n: w for n, w in weights.items() if decoder.names.block_of(n) is None}
    texts = [torch.arange(24).reshape(2, 12) + first for first in (4, 20)]
    with torch.no_grad():
        whole = [model(tokens, use_cache=False).logits for tokens in texts]
        streams = [decoder.embed(outside, tokens) for tokens in texts]
        for index in range(len(decoder.blocks)):
            own = of_block(decoder, index, weights)
            streams = [decoder.run_block(index, own, hidden) for hidden in streams]
        streamed = [decoder.logits(outside, hidden) for hidden in streams]
    for a, b in zip(streamed, whole, strict=True):
        assert (a - b).abs().max() == 0


@pytest.mark.parametrize("name", MERGED)
def test_the_merge_loads_and_every_fit_beats_the_average(
    name: str, seen: Callable[[str], Seen]
) -> None:
    merged = merged_of(seen(name))
    assert unfound(merged.path, CASES[name]) == {}
    fitted = [entry for entry in merged.entries.values() if entry["outcome"] == "fitted"]
    kinds = {entry["kind"] for entry in merged.entries.values()} - MAY_KEEP_START
    assert {entry["kind"] for entry in fitted} >= kinds >= {"embedding", "linear"}
    assert all(entry["held_out_fitted"] < entry["held_out_start"] for entry in fitted)
    known = [entry for entry in fitted if "loss_fitted" in entry]  # of a head it is not measured
    assert all(entry["loss_fitted"] <= entry["loss_start"] * 1.05 for entry in known)


@pytest.mark.parametrize("name", MERGED)
def test_the_averaged_tensors_are_those_of_the_case(name: str, seen: Callable[[str], Seen]) -> None:
    merged = merged_of(seen(name))
    averaged = {t: e["outcome"] for t, e in merged.entries.items() if "averaged" in e["outcome"]}
    patterns = CASES[name].averaged
    told = {t for t in merged.entries for p in patterns.values() if re.search(p, t)}
    assert averaged.keys() == told
    assert all(any(re.search(p, tensor) for tensor in averaged) for p in patterns.values())
    for tensor, outcome in averaged.items():
        outside = any(re.search(patterns[label], tensor) for label in OUTSIDE if label in patterns)
        assert (outcome == "averaged: outside of the decoder") == outside


@pytest.mark.parametrize("name", MERGED)
def test_coefficients_run_along_what_enters_a_module(
    name: str, seen: Callable[[str], Seen]
) -> None:
    """Held against the sizes that torch's and transformers' modules say they have."""
    found = seen(name)
    merged = merged_of(found)
    config = AutoConfig.from_pretrained(found.models.base)
    model = build_model(config)
    names, axes = WeightNames.of(model), merged.coefficients.metadata["axes"]
    entering = 0
    for tensor, rows in merged.coefficients.coefficients.items():
        parameter = names.in_model(tensor)
        if rows.shape[1] == 1 or parameter is None:
            continue
        module = model.get_submodule(parameter.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            assert (rows.shape[1], axes.get(tensor, -1)) == (module.in_features, -1)
            entering += 1
        elif isinstance(module, Conv1D):
            assert (rows.shape[1], axes.get(tensor, -1)) == (module.nx, 0)
            entering += 1
        elif isinstance(module, nn.Embedding):
            assert (rows.shape[1], axes.get(tensor, -1)) == (module.embedding_dim, -1)
        else:  # a norm, a router, or experts: coefficients of each, one after the other
            shape, axis = model.state_dict()[parameter].shape, axes.get(tensor, -1)
            experts = shape[0] if len(shape) == 3 else 1
            assert rows.shape[1] == experts * shape[axis]
            if experts > 1 and re.search("gate_up_proj|input_linear", tensor):
                assert shape[axis] == config.get_text_config().hidden_size
    assert entering


@pytest.mark.parametrize("name", MERGED)
def test_replays_are_the_merge_and_one_hot_coefficients_a_source(
    name: str, seen: Callable[[str], Seen], tmp_path: Path
) -> None:
    found = seen(name)
    merged, models = merged_of(found), found.models
    replay = dam(models.models, base=models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "again").model_bytes == merged.model_bytes
    file = merged.coefficients
    one_hot = {tensor: rows.clone().zero_() for tensor, rows in file.coefficients.items()}
    for rows in one_hot.values():
        rows[file.sources.index(models.models[1].name)] = 1
    CoefficientFile(one_hot, file.sources, file.metadata).save(tmp_path / FILE_NAME)
    replay = dam(models.models, base=models.base, coefficients=str(tmp_path))
    copied = merge(replay, tmp_path / "copied")
    source = tensors_of(models.models[1])
    for tensor in copied.tensors.keys() & source.keys():
        assert torch.equal(copied.tensors[tensor], source[tensor])
    case = CASES[name]
    kind = AutoModelForCausalLM if case.kind is None else case.kind
    a, b = (
        kind.from_pretrained(path, dtype=torch.float32) for path in (copied.path, models.models[1])
    )
    assert all(map(torch.equal, weights_of(a).values(), weights_of(b).values()))
    tokens = torch.randint(4, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits_of(a, tokens), logits_of(b, tokens))


@pytest.mark.parametrize(
    ("feature", "name", "tensor", "kind"),
    [
        ("transposed, fused q, k and v", "gpt2", "h.0.attn.c_attn.weight", "linear"),
        ("transposed, biased", "gpt2", "h.1.mlp.c_proj.bias", "bias"),
        ("positions that are learned", "gpt2", "wpe.weight", "embedding"),
        ("fused q, k and v", "pythia", "layers.0.attention.query_key_value.weight", "linear"),
        ("fused q, k and v of groups", "phi3", "layers.0.self_attn.qkv_proj.weight", "linear"),
        ("one key for all heads", "gpt-bigcode", "h.0.attn.c_attn.weight", "linear"),
        ("fused gate and up", "phi3", "layers.0.mlp.gate_up_proj.weight", "linear"),
        ("fused gate and up, sandwich norms", "glm4", "layers.0.mlp.gate_up_proj.weight", "linear"),
        ("biases of q, k and v alone", "qwen2", "layers.0.self_attn.k_proj.bias", "bias"),
        ("norms of q and k, head by head", "qwen3", "layers.0.self_attn.q_norm.weight", "norm"),
        ("norms of q and k, all heads at once", "olmo2", "self_attn.k_norm.weight", "norm"),
        ("norms of q and k that add one", "gemma3", "layers.1.self_attn.q_norm.weight", "norm"),
        ("two norms side by side", "falcon-40b", "h.0.ln_mlp.weight", "norm"),
        ("a norm before attention and MLP alike", "gpt-j", "h.0.ln_1.weight", "norm"),
        ("parallel residuals: attention", "phi", "layers.0.self_attn.dense.weight", "linear"),
        ("parallel residuals: MLP", "phi", "layers.0.mlp.fc2.weight", "linear"),
        ("parallel residuals: MLP", "cohere2", "layers.1.mlp.down_proj.weight", "linear"),
        ("sandwich norms, soft caps", "gemma2", "post_feedforward_layernorm.weight", "norm"),
        ("norms after alone", "exaone4", "layers.0.post_attention_layernorm.weight", "norm"),
        ("sliding layers", "gemma3", "layers.0.self_attn.o_proj.weight", "linear"),
        ("full layers beside them", "gemma3", "layers.1.self_attn.o_proj.weight", "linear"),
        ("convolution layers", "lfm2", "layers.0.conv.in_proj.weight", "linear"),
        ("attention beside them", "lfm2", "layers.1.self_attn.q_proj.weight", "linear"),
        ("state-space layers", "mamba", "layers.0.mixer.x_proj.weight", "linear"),
        ("both in one layer", "falcon-h1", "layers.0.mamba.in_proj.weight", "linear"),
        ("low-rank attention", "deepseek-v3", "layers.0.self_attn.kv_b_proj.weight", "linear"),
        ("an expert for all tokens", "qwen2-moe", "shared_expert.down_proj.weight", "linear"),
        ("scaled residuals", "granite", "layers.0.mlp.down_proj.weight", "linear"),
        ("a head that is tied", "gemma", "model.embed_tokens.weight", "embedding"),
        ("a head of its own", "llama", "lm_head.weight", "head"),
        ("a tied head that is saved", "falcon-40b", "lm_head.weight", "head"),
        ("a language model within another", "llava", "layers.0.mlp.down_proj.weight", "linear"),
    ],
)
def test_features_are_seen_for_what_they_are(
    feature: str, name: str, tensor: str, kind: str, seen: Callable[[str], Seen]
) -> None:
    entries = merged_of(seen(name)).entries
    found = [entry for own, entry in entries.items() if own.endswith(tensor)]
    assert found, feature
    assert {entry["kind"] for entry in found} == {kind}
    assert all("averaged" not in entry["outcome"] for entry in found)


@pytest.mark.parametrize("name", CASES)
def test_the_readme_has_it_where_it_was_seen(name: str, seen: Callable[[str], Seen]) -> None:
    found = seen(name)
    cells = {
        row: (defined, inferred)
        for row, defined, inferred in (
            line.strip("| ").split(" | ") if line.count(" | ") == 2 else line[2:-2].split(" | ")
            for line in written_table().replace("|  |", "| - |").splitlines()[2:]
        )
    }
    title = found.case.title + (LOST if found.linear == "loses weights" else "")
    assert title in cells[found.row][0 if found.defined else 1].split(", ")
