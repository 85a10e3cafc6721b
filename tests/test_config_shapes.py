"""Configurations of every shape that mergekit knows: merged, or refused with what to change.

Models have three layers, and all differ in every tensor. What a merge must do is told by models
made of the sources' tensors by hand, and by transformers' own forward pass.
"""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from mergekit import merge_methods
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mergekit_dam.errors import ArchitectureError, ConfigError
from mergekit_dam.host import tasks
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.request.method import DamMerge
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams.stream import Stream
from tests.merging import SMALL, linear, merge, tensors_of, watched_reads
from tests.models import (
    ARCHITECTURES,
    Models,
    make_model,
    make_tokenizer,
    save_calibration,
    save_models,
    tiny_llama_config,
)

LAYERS = 3
BOUNDED = {
    "objective": "logits",
    "metric": None,
    "steps": 2,
    "sum_to_one": False,
    "nonlinearity": "sigmoid",
    "overlap": 0.1,
}
SEARCHED = {**SMALL, "objective": "layer+logits", "metric": "sensitivity", "steps": 2}


@dataclass(frozen=True)
class Case:
    """A base and three fine-tunes, with text for each."""

    models: Models
    texts: tuple[Path, ...]

    def __getitem__(self, index: int) -> Path:
        return self.models.models[index]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("shapes")
    models = save_models(folder, tiny_llama_config(num_hidden_layers=LAYERS), count=3)
    texts = tuple(save_calibration(folder, seed=k, offset=16 * k) for k in range(4))
    return Case(models, texts)


Range = tuple[int, int]


def sliced(
    case: Case, *slices: Mapping[int | str, Range], base: bool = False, **parameters: Any
) -> dict[str, Any]:
    """A dam merge of slices: for each, the layers of models by number (or of the "base")."""
    entries = []
    for layers in slices:
        sources: list[dict[str, Any]] = []
        for index, ends in layers.items():
            path = case.models.base if isinstance(index, str) else case[index]
            source: dict[str, Any] = {"model": str(path), "layer_range": list(ends)}
            if not isinstance(index, str):
                source["parameters"] = {"calibration": str(case.texts[index])}
            sources.append(source)
        entries.append({"sources": sources})
    return {
        "merge_method": "dam",
        **({"base_model": str(case.models.base)} if base else {}),
        "slices": entries,
        "parameters": {k: v for k, v in {**SMALL, **parameters}.items() if v is not None},
    }


def stack(case: Case, *layers: tuple[int, int], ends: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of a model made of (model, layer) pairs, with the ends of two models."""
    first, last = (tensors_of(case[index]) for index in ends)
    made = {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}
    for number, (index, layer) in enumerate(layers):
        own = f"model.layers.{layer}."
        for name, tensor in tensors_of(case[index]).items():
            if name.startswith(own):
                made[f"model.layers.{number}.{name.removeprefix(own)}"] = tensor
    return made | {name: last[name] for name in ("model.norm.weight", "lm_head.weight")}


def loaded(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model


@contextmanager
def leaving_teachers():
    """Keep every teacher's tokens, and what leaves its last block, by source."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    tokens: dict[int, Tensor] = {}
    stock = fit_stage

    def run(opened: OpenStage, streams: list[Stream], *args: Any, **kwargs: Any) -> Any:
        stage = opened.stage
        for stream in streams:
            if stage.kind == "input":
                tokens[stream.source] = torch.as_tensor(stream.merged[:]).clone()
            if stage.kind == "output":
                hidden = torch.as_tensor(stream.teacher[:]).clone()
                found[stream.source] = (tokens[stream.source], hidden)
        return stock(opened, streams, *args, **kwargs)

    with mock.patch.object(tasks, "fit_stage", run):
        yield found


def before_the_norm(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What leaves the last layer of a Llama, by its own forward pass."""
    found: list[Tensor] = []
    body: Any = model.model
    handle = body.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return found[0]


class TestSlices:
    def test_a_slice_of_one_model_is_copied_and_others_are_merged(
        self, case: Case, tmp_path: Path
    ) -> None:
        configuration = sliced(case, {0: (0, 1)}, {0: (1, 2), 1: (1, 2)}, {0: (2, 3)})
        merged = merge(configuration, tmp_path / "out")
        own = tensors_of(case[0])
        for name, tensor in merged.tensors.items():
            middle = ".layers.1." in name
            assert torch.equal(tensor, own[name]) != middle, name
            outcome = merged.entries[name]["outcome"]
            assert outcome == "copied: of one model alone" or middle
            assert not merged.coefficients.coefficients[name][1].any() or middle
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}
        merged.load()

    def test_a_model_that_a_slice_leaves_out_is_its_own_teacher_there(
        self, case: Case, tmp_path: Path
    ) -> None:
        configuration = sliced(case, {0: (0, 1)}, {0: (1, 2), 1: (1, 2)}, {0: (2, 3)})
        with leaving_teachers() as found:
            merge(configuration, tmp_path / "out")
        for source, (tokens, hidden) in found.items():
            expected = before_the_norm(loaded(case[source]), tokens)
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        assert set(found) == {0, 1}

    @pytest.mark.parametrize("parameters", [SEARCHED, {"sum_to_one": False}, BOUNDED], ids=str)
    def test_other_fits_of_it_replay(
        self, case: Case, tmp_path: Path, parameters: dict[str, Any]
    ) -> None:
        slices: list[Mapping[int | str, Range]] = [
            {1: (0, 1)},
            {0: (1, 2), 2: (1, 2)},
            {0: (2, 3), 1: (2, 3), 2: (2, 3)},
        ]
        merged = merge(sliced(case, *slices, **parameters), tmp_path / "out")
        first = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(merged.tensors[first], tensors_of(case[1])[first])
        configuration = sliced(case, *slices, **parameters, coefficients=str(merged.path))
        with watched_reads() as reads:
            again = merge(configuration, tmp_path / "again")
        assert again.model_bytes == merged.model_bytes
        # In the first layer two models neither are merged nor teach: nobody fits.
        assert {folder for folder, name in reads.order if ".layers.0." in name} == {str(case[1])}

    def test_a_model_without_a_say_is_read_where_it_is_merged_alone(
        self, case: Case, tmp_path: Path
    ) -> None:
        configuration = sliced(case, {0: (0, 2)}, {0: (2, 3), 1: (2, 3)})
        configuration["slices"][1]["sources"][1]["parameters"] = {"loss_weight": 0}
        with watched_reads() as reads:
            merged = merge(configuration, tmp_path / "out")
        names = {name for folder, name in reads.order if folder == str(case[1])}
        assert not any(".layers.0." in name or "embed" in name for name in names)
        assert {"lm_head.weight", "model.norm.weight"} <= names  # mergekit forgets a model here
        assert merged.coefficients.coefficients["lm_head.weight"][1].any()

    def test_a_base_has_a_part_where_it_is_listed(self, case: Case, tmp_path: Path) -> None:
        slices: list[Mapping[int | str, Range]] = [
            {0: (0, 1)},
            {0: (1, 2), 1: (1, 2), "base": (1, 2)},
            {0: (2, 3), "base": (2, 3)},
        ]
        merged = merge(sliced(case, *slices, base=True), tmp_path / "out")
        sources = merged.coefficients.sources
        assert sources == (str(case[0]), str(case[1]), str(case.models.base))
        for name, rows in merged.coefficients.coefficients.items():
            layer = 0 if "embed" in name else int(name.split(".")[2]) if "layers" in name else 2
            torch.testing.assert_close(rows.sum(0), torch.ones(rows.shape[1]))
            assert rows[1].any() == (layer == 1), name
            assert not (layer == 0 and rows[2].any()), name

    @pytest.mark.parametrize("parameters", [{}, {"include_base": True}, {"sum_to_one": False}])
    def test_layers_of_the_base_alone_are_copied(
        self, case: Case, tmp_path: Path, parameters: dict[str, Any]
    ) -> None:
        ends: Mapping[int | str, Range] = {0: (2, 3), 1: (2, 3), "base": (2, 3)}
        configuration = sliced(case, {"base": (0, 2)}, ends, base=True, **parameters)
        if "include_base" in parameters:
            configuration["parameters"]["calibration"] = str(case.texts[3])
        merged = merge(configuration, tmp_path / "out")
        own = tensors_of(case.models.base)
        first = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(merged.tensors[first], own[first])
        assert len(merged.report["calibration"]) == (3 if "include_base" in parameters else 2)
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}

    @pytest.mark.parametrize("both", [True, False])
    def test_tokens_that_a_copied_model_lacks_come_from_the_others(
        self, case: Case, tmp_path: Path, both: bool
    ) -> None:
        """As mergekit has it for models that are merged; a replay has them too."""
        other = tmp_path / "other"
        shutil.copytree(case[1], other)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["alpha"])
        tokenizer.save_pretrained(other)
        ends: Mapping[int | str, Range] = {0: (1, 3), 1: (1, 3)} if both else {1: (1, 3)}
        configuration = sliced(case, {0: (0, 1)}, ends)
        configuration["slices"][1]["sources"][-1]["model"] = str(other)
        configuration["tokenizer"] = {"source": "union"}
        merged = merge(configuration, tmp_path / "out")
        token = AutoTokenizer.from_pretrained(merged.path).convert_tokens_to_ids("alpha")
        name, own = "model.embed_tokens.weight", tokenizer.convert_tokens_to_ids("alpha")
        assert torch.equal(merged.tensors[name][token], tensors_of(other)[name][own])
        configuration["parameters"]["coefficients"] = str(merged.path)
        assert merge(configuration, tmp_path / "again").model_bytes == merged.model_bytes

    def test_a_stack_of_slices_of_one_model_each_is_copied_without_text(
        self, case: Case, tmp_path: Path
    ) -> None:
        configuration = sliced(case, {0: (0, 2)}, {1: (1, 3)}, base=True)
        for entry in configuration["slices"]:
            del entry["sources"][0]["parameters"]
        merged = merge(configuration, tmp_path / "out")
        expected = stack(case, (0, 0), (0, 1), (1, 1), (1, 2), ends=(0, 1))
        assert merged.tensors.keys() == expected.keys()
        assert all(torch.equal(merged.tensors[name], expected[name]) for name in expected)
        stock = {k: v for k, v in configuration.items() if k not in ("base_model", "parameters")}
        passed = merge({**stock, "merge_method": "passthrough"}, tmp_path / "stock")
        assert passed.tensors.keys() == merged.tensors.keys()
        assert all(torch.equal(merged.tensors[n], t) for n, t in passed.tensors.items())
        assert {entry["outcome"] for entry in merged.entries.values()} == {
            "copied: of one model alone"
        }
        assert merged.load().config.num_hidden_layers == 4

    @pytest.mark.parametrize(
        ("slices", "layers"),
        [
            ([{0: (0, 2), 1: (1, 3)}], {0: (0, 1), 1: (1, 2)}),
            ([{0: (1, 3), 1: (1, 3)}, {0: (0, 2), 1: (0, 2)}], {0: (1, 2, 0, 1), 1: (1, 2, 0, 1)}),
            ([{0: (0, 1), 1: (2, 3)}, {1: (0, 2)}], {0: (0, 0, 1), 1: (2, 0, 1)}),
        ],
        ids=["shifted", "repeated", "in part"],
    )
    def test_a_teacher_is_the_stack_that_the_slices_describe(
        self,
        case: Case,
        tmp_path: Path,
        slices: list[Mapping[int | str, Range]],
        layers: dict[int, tuple[int, ...]],
    ) -> None:
        with leaving_teachers() as found:
            merged = merge(sliced(case, *slices), tmp_path / "out")
        assert merged.load().config.num_hidden_layers == len(layers[0])
        for source, (tokens, hidden) in found.items():
            config = tiny_llama_config(num_hidden_layers=len(layers[source]))
            teacher = make_model(config)
            pairs = [(source, layer) for layer in layers[source]]
            teacher.load_state_dict(stack(case, *pairs, ends=(source, source)))
            expected = before_the_norm(teacher, tokens)
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        assert set(found) == {0, 1}

    def test_a_teacher_of_another_depth_keeps_its_own_forward_pass(
        self, case: Case, tmp_path: Path
    ) -> None:
        """Its rotary base, say, which is not the merged model's."""
        config = tiny_llama_config(
            num_hidden_layers=4, rope_parameters={"rope_type": "default", "rope_theta": 50.0}
        )
        other = save_models(tmp_path, config, count=1, seed=3).models[0]
        configuration = sliced(case, {0: (0, 3), 1: (0, 3)})
        source = configuration["slices"][0]["sources"][1]
        source["model"], source["layer_range"] = str(other), [1, 4]
        with leaving_teachers() as found:
            merge(configuration, tmp_path / "out")
        tokens, hidden = found[1]
        shorter = loaded(other)
        body: Any = shorter.model
        body.layers = body.layers[1:]
        torch.testing.assert_close(hidden, before_the_norm(shorter, tokens), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gemma3"])
    def test_what_a_configuration_says_of_each_layer_follows_the_layers(
        self, architecture: str, tmp_path: Path
    ) -> None:
        """mergekit's own methods fail here: transformers refuses to save what they leave."""
        models = save_models(tmp_path / "m", ARCHITECTURES[architecture](), count=2)
        texts = tuple(save_calibration(tmp_path, seed=k, offset=16 * k) for k in range(2))
        own = loaded(models.models[0]).config.layer_types
        case = Case(models, texts)
        configuration = sliced(case, {0: (0, 2), 1: (0, 2)}, {0: (1, 2), 1: (1, 2)}, {1: (0, 1)})
        merged = merge(configuration, tmp_path / "out")
        assert merged.load().config.layer_types == [own[0], own[1], own[1], own[0]]

    def test_layers_that_a_model_does_not_have_are_refused(
        self, case: Case, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"slices\[0\]: `layer_range` is \[1, 4\], but .* 3"):
            merge(sliced(case, {0: (0, 3), 1: (1, 4)}), tmp_path / "out")
        short = save_models(
            tmp_path / "short", tiny_llama_config(num_hidden_layers=1), count=1
        ).models[0]
        configuration = sliced(case, {0: (0, 1), 1: (0, 1)}, {0: (1, 3)})
        configuration["slices"][0]["sources"][1]["model"] = str(short)
        with pytest.raises(ConfigError, match=r"slices\[1\]: takes layers up to 3 .* has 1, so"):
            merge(configuration, tmp_path / "out")
        configuration["slices"][0]["sources"][1]["parameters"] = {"loss_weight": 0}
        merge(configuration, tmp_path / "out").load()

    @pytest.mark.parametrize("learns", [True, False])
    def test_a_stack_of_models_of_different_sizes_is_refused(
        self, case: Case, tmp_path: Path, learns: bool
    ) -> None:
        """passthrough writes it, and nothing can load what it writes."""
        config = tiny_llama_config(num_hidden_layers=2, intermediate_size=32)
        wide = save_models(tmp_path / "wide", config, count=1, seed=5).models[0]
        middle: Mapping[int | str, Range] = {0: (1, 2), 1: (1, 2)} if learns else {0: (1, 2)}
        configuration = sliced(case, {0: (0, 1)}, middle, {2: (0, 1)})
        source = configuration["slices"][-1]["sources"][0]
        source["model"] = str(wide)
        source["parameters"]["loss_weight"] = 0
        with pytest.raises(ArchitectureError, match=r"mlp.up_proj.weight: (shapes differ|\[32, )"):
            merge(configuration, tmp_path / "out")

    def test_a_stack_of_models_of_different_vocabularies(self, case: Case, tmp_path: Path) -> None:
        config = tiny_llama_config(num_hidden_layers=2, vocab_size=80)
        other = save_models(tmp_path / "other", config, count=1, seed=5).models[0]
        configuration = sliced(case, {0: (0, 2)}, {1: (0, 2)})
        configuration["slices"][1]["sources"][0]["model"] = str(other)
        with pytest.raises(ArchitectureError, match=r"lm_head.weight: \[80, 16\], not \[64, 16\]"):
            merge(configuration, tmp_path / "out")
        cut = merge(configuration, tmp_path / "cut", unsafe_truncate_embeddings=True)
        assert cut.load().config.vocab_size == 64
        configuration["tokenizer"] = {"source": "union"}
        assert merge(configuration, tmp_path / "out").load().config.num_hidden_layers == 4

    def test_models_of_different_depth_are_refused(self, case: Case, tmp_path: Path) -> None:
        short = save_models(
            tmp_path / "short", tiny_llama_config(num_hidden_layers=1), count=1
        ).models[0]
        configuration = dam_of([case[0], short], case.texts)
        with pytest.raises(ConfigError, match=r"models: required as many layers of every model, g"):
            merge(configuration, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_slices_of_a_module(self, case: Case, tmp_path: Path) -> None:
        configuration = sliced(case, {0: (0, 1)}, {0: (1, 3), 1: (1, 3)})
        plain = merge(configuration, tmp_path / "plain")
        configuration["modules"] = {"default": {"slices": configuration.pop("slices")}}
        assert merge(configuration, tmp_path / "out").model_bytes == plain.model_bytes

    def test_a_configuration_that_is_merged_is_left_as_it_was(
        self, case: Case, tmp_path: Path
    ) -> None:
        configuration = sliced(case, {0: (0, 1)}, {0: (1, 3), 1: (1, 3)})
        merged = merge(configuration, tmp_path / "out")
        again = merge(configuration, tmp_path / "again")
        assert again.model_bytes == merged.model_bytes
        written = (merged.path / "mergekit_config.yml").read_text("utf-8")
        assert written.count("layer_range") == 3


def dam_of(models: Sequence[Path], texts: Sequence[Path], **settings: Any) -> dict[str, Any]:
    return {
        "merge_method": "dam",
        "models": [
            {"model": str(model), "parameters": {"calibration": str(text)}}
            for model, text in zip(models, texts, strict=False)
        ],
        "parameters": dict(SMALL),
        **settings,
    }


class TestModels:
    def test_the_base_may_be_listed_or_not(self, case: Case, tmp_path: Path) -> None:
        base = str(case.models.base)
        unlisted = dam_of(case.models.models[:2], case.texts, base_model=base)
        plain = merge(unlisted, tmp_path / "plain")
        for place in (0, 1, 2):
            listed = copy.deepcopy(unlisted)
            listed["models"].insert(place, {"model": base})
            merged = merge(listed, tmp_path / str(place))
            assert merged.coefficients.sources[place] == base
            for name, tensor in merged.tensors.items():
                torch.testing.assert_close(tensor, plain.tensors[name], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_any_number_of_models(self, tmp_path: Path, count: int) -> None:
        models = save_models(tmp_path, tiny_llama_config(num_hidden_layers=1), count=count)
        texts = [save_calibration(tmp_path, seed=k, offset=8 * k) for k in range(count)]
        merged = merge(dam_of(models.models, texts), tmp_path / "out")
        assert len(merged.coefficients.sources) == count
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}
        merged.load()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_one_model_is_copied_in_any_dtype(self, case: Case, tmp_path: Path, dtype: str) -> None:
        configuration = {
            "merge_method": "dam",
            "models": [{"model": str(case[0])}],
            "dtype": dtype,
        }
        with watched_reads() as reads:
            merged = merge(configuration, tmp_path / "out")
        own = tensors_of(case[0])
        assert len(reads.order) == len(own)
        assert all(
            torch.equal(tensor, own[name].to(getattr(torch, dtype)))
            for name, tensor in merged.tensors.items()
        )
        again = merge(
            {**configuration, "parameters": {"coefficients": str(merged.path)}}, tmp_path / "again"
        )
        assert again.model_bytes == merged.model_bytes

    def test_the_same_model_by_two_names_is_copied(self, case: Case, tmp_path: Path) -> None:
        other = tmp_path / "link"
        other.symlink_to(case[0])
        merged = merge(dam_of([case[0], other], case.texts), tmp_path / "out")
        own = tensors_of(case[0])
        assert all(torch.equal(tensor, own[name]) for name, tensor in merged.tensors.items())
        stock = merge(linear([case[0], other]), tmp_path / "stock")
        assert all(torch.equal(tensor, stock.tensors[n]) for n, tensor in merged.tensors.items())

    def test_the_same_model_by_one_name_is_refused_by_every_method(
        self, case: Case, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="is listed 2 times; list it once"):
            merge(dam_of([case[0], case[0]], case.texts), tmp_path / "out")
        with pytest.raises(ValueError, match="Duplicate merge inputs"):
            merge(linear([case[0], case[0]]), tmp_path / "out")

    def test_the_same_model_by_two_names_beside_another(self, case: Case, tmp_path: Path) -> None:
        other = tmp_path / "link"
        other.symlink_to(case[0])
        merged = merge(dam_of([case[0], other, case[1]], case.texts), tmp_path / "out")
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}
        assert all(tensor.isfinite().all() for tensor in merged.tensors.values())

    def test_dtypes_are_mergekits(self, case: Case, tmp_path: Path) -> None:
        settings = {"dtype": "float16", "out_dtype": "bfloat16"}
        merged = merge(dam_of(case.models.models[:2], case.texts, **settings), tmp_path / "out")
        assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}
        assert json.loads((merged.path / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def adapters(case: Case, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's
        first = save_adapter(case.models.base, folder / "a", ("q_proj", "down_proj"), seed=0)
        second = save_adapter(case.models.base, folder / "b", ("v_proj", "up_proj"), seed=1)
    return first, second


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
class TestAdapters:
    """Adapters on some projections of the base, with values that are told by peft itself."""

    def test_an_adapter_alone_is_what_peft_makes_of_it(
        self, case: Case, adapters: tuple[Path, Path], tmp_path: Path
    ) -> None:
        peft = pytest.importorskip("peft")
        reference = f"{case.models.base}+{adapters[0]}"
        configuration = {"merge_method": "dam", "models": [{"model": reference}]}
        merged = merge(configuration, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
        model = peft.PeftModel.from_pretrained(loaded(case.models.base), adapters[0])
        expected = model.merge_and_unload().state_dict()
        assert merged.tensors.keys() == expected.keys()
        for name, tensor in merged.tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        base = tensors_of(case.models.base)
        moved = {n.split(".")[-2] for n, t in merged.tensors.items() if not torch.equal(t, base[n])}
        assert moved == {"q_proj", "down_proj"}

    def test_two_adapters_of_one_base_are_merged(
        self, case: Case, adapters: tuple[Path, Path], tmp_path: Path
    ) -> None:
        references = [Path(f"{case.models.base}+{adapter}") for adapter in adapters]
        configuration = dam_of(references, case.texts, base_model=str(case.models.base))
        merged = merge(configuration, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
        fitted = {n for n, entry in merged.entries.items() if entry["outcome"] == "fitted"}
        assert {name.split(".")[-2] for name in fitted} <= {
            *("q_proj", "down_proj", "v_proj", "up_proj")
        }
        assert fitted
        same = [e for e in merged.entries.values() if e["outcome"] == "identical in all models"]
        assert len(same) == len(merged.tensors) - 4 * LAYERS
        for name in (entry["name"] for entry in same):
            assert torch.equal(merged.tensors[name], tensors_of(case.models.base)[name])


def save_adapter(base: Path, folder: Path, targets: Sequence[str], *, seed: int) -> Path:
    """A LoRA adapter with every weight drawn from a seed."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        loaded(base), peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


Config = dict[str, Any]


def of(case: Case, text: str) -> Config:
    """A configuration in which A, B, C and BASE stand for models, as a user would have it."""
    for name, model in zip("ABC", case.models.models, strict=True):
        text = re.sub(rf"\b{name}\b", str(model), text)
    config: Config = yaml.safe_load(text.replace("BASE", str(case.models.base)))
    return config


def with_text(case: Case, config: Config) -> Config:
    """The same with the method dam, and text for every model but the base."""
    config = copy.deepcopy(config)
    config["merge_method"] = "dam"
    config["parameters"] = {**SMALL, **config.get("parameters", {})}
    for entry, model in entries(config):
        if model != config.get("base_model"):
            text = case.texts[list(map(str, case.models.models)).index(model)]
            entry.setdefault("parameters", {})["calibration"] = str(text)
    return config


def entries(config: Config) -> list[tuple[Config, str]]:
    found = list(config.get("models", []))
    for entry in config.get("slices", []):
        found += entry["sources"]
    return [(entry, entry["model"]) for entry in found]


def told(config: Config, case: Case, out: Path) -> tuple[Config, set[str]]:
    """Do what the one error says; the configuration then, and the parameters removed."""
    with pytest.raises(ConfigError) as caught:
        merge(config, out)
    assert not out.exists()
    config, removed = copy.deepcopy(config), set()
    for problem in caught.value.problems:
        found = re.search(r"`(\w+)` is a parameter of .*, not of dam; remove it$", problem)
        if found is None:
            assert "set `include_base: true` at top level" in problem
            config["parameters"] |= {"include_base": True, "calibration": str(case.texts[3])}
            continue
        name = found[1]
        removed.add(name)
        scopes = [config, *(entry for entry, _ in entries(config)), *config.get("slices", [])]
        holding = [scope["parameters"] for scope in scopes if name in scope.get("parameters", {})]
        assert problem.count(" (") == len(holding)  # every place is named
        for parameters in holding:
            del parameters[name]
    return config, removed


AS_IT_IS = {
    "linear: models with weights": """
        models:
          - {model: A, parameters: {weight: 1.0}}
          - {model: B, parameters: {weight: 0.3}}
          - {model: C, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: float16
    """,
    "passthrough: a stack of two models' layers": """
        slices:
          - sources: [{model: A, layer_range: [0, 2]}]
          - sources: [{model: B, layer_range: [1, 3]}]
        merge_method: passthrough
        dtype: float16
    """,
    "passthrough: the first layers of one model": """
        slices:
          - sources: [{model: A, layer_range: [0, 2]}]
        merge_method: passthrough
        dtype: float16
    """,
    "layershuffle: single layers of several models": """
        slices:
          - sources: [{model: B, layer_range: [0, 1]}]
          - sources: [{model: A, layer_range: [1, 2]}]
          - sources: [{model: C, layer_range: [2, 3]}]
        merge_method: passthrough
        dtype: bfloat16
    """,
    "model_stock: models and a base, no parameters": """
        models: [{model: A}, {model: B}, {model: C}]
        base_model: BASE
        merge_method: model_stock
        chat_template: chatml
    """,
    "karcher: two models, no base": """
        models: [{model: A}, {model: B}]
        merge_method: karcher
        tokenizer_source: union
    """,
    "a weight at top level": """
        models: [{model: A}, {model: B}]
        merge_method: linear
        parameters: {weight: 0.5}
    """,
}

AS_TOLD: dict[str, tuple[str, set[str]]] = {
    "ties: gradients and filters": (
        """
        models:
          - {model: A, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: B, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
          - model: C
            parameters:
              density: 0.33
              weight: [{filter: mlp, value: 0.5}, {value: 0}]
        merge_method: ties
        base_model: BASE
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
        {"density", "normalize", "int8_mask"},
    ),
    "ties: two models and a base that is not listed": (
        """
        models:
          - {model: A, parameters: {density: 0.5, weight: 0.5}}
          - {model: B, parameters: {density: 0.5, weight: 0.5}}
        merge_method: ties
        base_model: BASE
        parameters: {normalize: false, int8_mask: true}
        dtype: float16
        """,
        {"density", "normalize", "int8_mask"},
    ),
    "slerp: slices, and t by filter and gradient": (
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 3]}
              - {model: B, layer_range: [0, 3]}
        merge_method: slerp
        base_model: A
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        dtype: float16
        """,
        {"t"},
    ),
    "slerp: one model, and a base that is not listed": (
        """
        models: [{model: A}]
        merge_method: slerp
        base_model: BASE
        parameters: {t: 0.5}
        """,
        {"t"},
    ),
    "arcee_fusion: the base is one of two models": (
        """
        models: [{model: A}, {model: B}]
        merge_method: arcee_fusion
        base_model: A
        dtype: bfloat16
        """,
        set(),
    ),
    "a method of one's own: weights and a switch": (
        """
        merge_method: weighted_average
        models:
          - {model: A, parameters: {weight: 0.3}}
          - {model: B, parameters: {weight: 0.7}}
        parameters: {normalize: true}
        """,
        {"normalize"},
    ),
    "dare_ties: as an evolution writes it, slice by slice": (
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 2], parameters: {weight: 0.4, density: 0.9}}
              - {model: B, layer_range: [0, 2], parameters: {weight: 0.2, density: 0.8}}
              - {model: BASE, layer_range: [0, 2]}
          - sources:
              - {model: A, layer_range: [2, 3], parameters: {weight: 0.1, density: 0.5}}
              - {model: B, layer_range: [2, 3], parameters: {weight: 0.6, density: 0.4}}
              - {model: BASE, layer_range: [2, 3]}
        merge_method: dare_ties
        base_model: BASE
        parameters: {normalize: 1.0, int8_mask: 1.0, rescale: true, lambda: 0.9}
        dtype: bfloat16
        tokenizer_source: base
        """,
        {"density", "normalize", "int8_mask", "rescale", "lambda"},
    ),
    "passthrough: a scale by filter": (
        """
        models:
          - model: A
            parameters:
              scale: [{filter: o_proj, value: 0}, {value: 1}]
        merge_method: passthrough
        """,
        {"scale"},
    ),
}


def _names(method: merge_methods.MergeMethod | type[DamMerge]) -> set[str]:
    return {parameter.name for parameter in method.spec.parameters}


class TestExamples:
    """The shapes of the configurations in mergekit's examples and documentation."""

    @pytest.mark.parametrize("name", AS_IT_IS)
    def test_works_as_it_is(self, case: Case, tmp_path: Path, name: str) -> None:
        merged = merge(with_text(case, of(case, AS_IT_IS[name])), tmp_path / "out")
        merged.load()
        assert all(tensor.isfinite().all() for tensor in merged.tensors.values())

    @pytest.mark.parametrize("name", AS_TOLD)
    def test_works_once_it_is_as_the_error_says(
        self, case: Case, tmp_path: Path, name: str
    ) -> None:
        text, foreign = AS_TOLD[name]
        config = with_text(case, of(case, text))
        mended, removed = told(config, case, tmp_path / "out")
        assert removed == foreign
        merged = merge(mended, tmp_path / "out")
        merged.load()
        assert all(tensor.isfinite().all() for tensor in merged.tensors.values())

    @pytest.mark.parametrize(
        "method",
        [m for m in merge_methods.registered_methods() if _names(m) - _names(DamMerge)],
        ids=lambda method: method.spec.name,
    )
    def test_every_parameter_of_every_other_method_is_told(
        self, case: Case, tmp_path: Path, method: merge_methods.MergeMethod
    ) -> None:
        names, own = _names(method), _names(DamMerge)
        config = with_text(case, of(case, AS_IT_IS["a weight at top level"]))
        config["parameters"] |= dict.fromkeys(names - own, 0.5)
        mended, removed = told(config, case, tmp_path / "out")
        assert removed == names - own
        assert names - removed <= {"weight"}  # the same in both
        assert not removed & mended["parameters"].keys()
