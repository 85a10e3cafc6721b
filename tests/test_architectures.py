"""A whole merge of every architecture, and what it shows."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from mergekit_dam.coefficients.file import FILE_NAME, CoefficientFile
from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.build import build_model
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.names import WeightNames
from tests.architectures import (
    CASES,
    LOST,
    OUTSIDE,
    Case,
    Seen,
    save_case,
    see,
    tiny,
    unfound,
    written_table,
)
from tests.merging import Merged, dam, merge, tensors_of, watched_reads
from tests.models import make_model, save_token_ids, weights_of

MERGED = [name for name, case in CASES.items() if case.refused is None]
REFUSED = [name for name, case in CASES.items() if case.refused is not None]

MAY_KEEP_START = {"other", "bias", "head", "router", "experts"}
"""Kinds that there may be one tensor of, or little text for."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_token_ids(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def seen(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """What became of a case; every case is merged once."""
    known: dict[str, Seen] = {}

    def of(name: str) -> Seen:
        if name not in known:
            known[name] = see(CASES[name], tmp_path_factory.mktemp(name), texts)
        return known[name]

    return of


def merged_of(seen: Seen) -> Merged:
    assert seen.merged is not None, seen.refusal
    return seen.merged


def logits(model: PreTrainedModel, seed: int = 0) -> Tensor:
    tokens = torch.randint(4, 50, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", MERGED)
def test_blocks_run_one_by_one_equal_the_whole_model_exactly(name: str) -> None:
    """Two texts go through a block before the next block runs, as in a fit."""
    case = CASES[name]
    model = make_model(case.config(), kind=case.kind)
    model.config.architectures = [type(model).__name__]  # as it is saved
    decoder = Decoder(model.config, torch.device("cpu"))
    saved = model.state_dict(keep_vars=True)
    named = (*model.named_parameters(), *model.named_buffers())
    weights = {n: w.detach() for n, w in named if n in saved}
    outside = {n: w for n, w in weights.items() if decoder.block_of(n) is None}
    texts = [torch.arange(24).reshape(2, 12) + first for first in (4, 20)]
    with torch.no_grad():
        whole = [model(tokens, use_cache=False).logits for tokens in texts]
        streams = [decoder.embed(outside, tokens) for tokens in texts]
        for index in range(len(decoder.blocks)):
            prefix = f"{decoder.block_name(index)}."
            own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
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
    assert all(entry["loss_fitted"] <= entry["loss_start"] * 1.05 for entry in fitted)


@pytest.mark.parametrize("name", MERGED)
def test_what_is_averaged_is_what_is_said(name: str, seen: Callable[[str], Seen]) -> None:
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
        rows[file.sources.index(str(models.models[1]))] = 1
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
    assert all(map(torch.equal, weights_of(a), weights_of(b)))
    assert torch.equal(logits(a), logits(b))


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


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused_before_a_weight_is_read(
    name: str, seen: Callable[[str], Seen]
) -> None:
    found = seen(name)  # which asserts that nothing is read, and nothing left behind
    assert found.refusal is not None
    assert re.search(str(CASES[name].refused), found.refusal)
    assert "`linear`" in found.refusal or found.linear == "fails"


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_other_weights_can_be_refused(name: str, texts: list[Path], tmp_path: Path) -> None:
    models = save_case(CASES[name], tmp_path)
    configuration = dam(models.models, texts, samples=8, other_weights="error")
    with watched_reads() as reads, pytest.raises(Exception, match=r"outside of the decoder \("):
        merge(configuration, tmp_path / "out")
    assert not reads.order


def test_other_weights_that_are_none_are_not_refused(texts: list[Path], tmp_path: Path) -> None:
    models = save_case(CASES["llama"], tmp_path)
    merge(dam(models.models, texts, samples=4, other_weights="error"), tmp_path / "out").load()


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


def test_the_readme_has_no_others() -> None:
    written = {
        title.removesuffix(LOST)
        for line in written_table().splitlines()[2:]
        for cell in line.split("|")[2:4]
        for title in cell.strip().split(", ")
        if title
    }
    assert written - {case.title for case in CASES.values()} <= NAME_TO_ARCH.keys()


def test_every_architecture_that_mergekit_defines_is_a_case() -> None:
    """Those that transformers has no class for need code from the Hub; aliases share a class."""
    import transformers

    known = {name for name in NAME_TO_ARCH if hasattr(transformers, name)}
    assert known <= {architecture_of(case) for case in CASES.values()}


def architecture_of(case: Case) -> str:
    if case.kind is not None:
        return case.kind.__name__
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(case.config())]
    return str(kind.__name__)


@pytest.mark.slow
def test_every_causal_model_of_transformers_runs_in_parts_exactly_or_is_refused() -> None:
    """Of those that are tiny with the sizes at hand; nothing runs otherwise without a word."""
    exact: list[str] = []
    refused: list[str] = []
    wrong: list[str] = []
    tokens = torch.arange(24).reshape(2, 12) + 4
    for kind, config_class in CONFIG_MAPPING.items():
        if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        try:
            config = tiny(config_class)()
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > 3_000_000:
                continue
            model = make_model(config)
            with torch.no_grad():  # attention takes another kernel where gradients are asked for
                whole = model(tokens, use_cache=False).logits
        except Exception:  # it needs sizes of its own, or a package
            continue
        try:
            decoder = Decoder(model.config, torch.device("cpu"))
        except ArchitectureError:
            refused.append(kind)
            continue
        (exact if streamed_equals(decoder, model, tokens, whole) else wrong).append(kind)
    assert not wrong
    assert len(exact) > 100
    assert len(refused) > 5


def streamed_equals(
    decoder: Decoder, model: PreTrainedModel, tokens: Tensor, whole: Tensor
) -> bool:
    saved = model.state_dict(keep_vars=True)
    named = (*model.named_parameters(), *model.named_buffers())
    weights = {n: w.detach() for n, w in named if n in saved}
    outside = {n: w for n, w in weights.items() if decoder.block_of(n) is None}
    with torch.no_grad():
        hidden = decoder.embed(outside, tokens)
        for index in range(len(decoder.blocks)):
            prefix = f"{decoder.block_name(index)}."
            own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
            hidden = decoder.run_block(index, own, hidden)
        return torch.equal(decoder.logits(outside, hidden), whole)
