"""Merges of slices, against models made of the sources' tensors by hand."""

import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from mergekit_dam.errors import ArchitectureError, ConfigError
from mergekit_dam.layers import sweep
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.sources.stage import OpenStage
from mergekit_dam.streams.stream import Stream
from tests.kit.families import Family, Range, sliced, stack
from tests.kit.merging import SMALL, dam, merge, tensors_of
from tests.kit.models import ARCHITECTURES, loaded, make_model, save_models, tiny_llama_config
from tests.kit.reads import watched_reads
from tests.kit.texts import save_calibration
from tests.kit.tokenizers import make_tokenizer

BOUNDED = {
    "objective": "logits",
    "metric": None,
    "steps": 2,
    "sum_to_one": False,
    "nonlinearity": "sigmoid",
    "overlap": 0.1,
}
SEARCHED = {**SMALL, "objective": "layer+logits", "metric": "sensitivity", "steps": 2}


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

    with mock.patch.object(sweep, "fit_stage", run):
        yield found


def before_the_norm(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The output of the last layer of a Llama, by its own forward pass."""
    found: list[Tensor] = []
    body: Any = model.model
    handle = body.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return found[0]


class TestSlices:
    def test_a_slice_of_one_model_is_copied_and_others_are_merged(
        self, family: Family, tmp_path: Path
    ) -> None:
        configuration = sliced(family, {0: (0, 1)}, {0: (1, 2), 1: (1, 2)}, {0: (2, 3)})
        merged = merge(configuration, tmp_path / "out")
        own = tensors_of(family[0])
        for name, tensor in merged.tensors.items():
            middle = ".layers.1." in name
            assert torch.equal(tensor, own[name]) != middle, name
            outcome = merged.entries[name]["outcome"]
            assert outcome == "copied: of one model alone" or middle
            assert not merged.coefficients.coefficients[name][1].any() or middle
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}
        merged.load()

    def test_a_model_that_a_slice_leaves_out_is_its_own_teacher_there(
        self, family: Family, tmp_path: Path
    ) -> None:
        configuration = sliced(family, {0: (0, 1)}, {0: (1, 2), 1: (1, 2)}, {0: (2, 3)})
        with leaving_teachers() as found:
            merge(configuration, tmp_path / "out")
        for source, (tokens, hidden) in found.items():
            expected = before_the_norm(loaded(family[source]), tokens)
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        assert set(found) == {0, 1}

    @pytest.mark.parametrize("parameters", [SEARCHED, {"sum_to_one": False}, BOUNDED], ids=str)
    def test_other_fits_of_it_replay(
        self, family: Family, tmp_path: Path, parameters: dict[str, Any]
    ) -> None:
        slices: list[Mapping[int | str, Range]] = [
            {1: (0, 1)},
            {0: (1, 2), 2: (1, 2)},
            {0: (2, 3), 1: (2, 3), 2: (2, 3)},
        ]
        merged = merge(sliced(family, *slices, **parameters), tmp_path / "out")
        first = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(merged.tensors[first], tensors_of(family[1])[first])
        configuration = sliced(family, *slices, **parameters, coefficients=str(merged.path))
        with watched_reads() as reads:
            again = merge(configuration, tmp_path / "again")
        assert again.model_bytes == merged.model_bytes
        # In the first layer two models neither are merged nor teach: nobody fits.
        assert {folder for folder, name in reads.order if ".layers.0." in name} == {str(family[1])}

    def test_a_model_without_a_say_is_read_where_it_is_merged_alone(
        self, family: Family, tmp_path: Path
    ) -> None:
        configuration = sliced(family, {0: (0, 2)}, {0: (2, 3), 1: (2, 3)})
        configuration["slices"][1]["sources"][1]["parameters"] = {"loss_weight": 0}
        with watched_reads() as reads:
            merged = merge(configuration, tmp_path / "out")
        names = {name for folder, name in reads.order if folder == str(family[1])}
        assert not any(".layers.0." in name or "embed" in name for name in names)
        assert {"lm_head.weight", "model.norm.weight"} <= names  # mergekit forgets a model here
        assert merged.coefficients.coefficients["lm_head.weight"][1].any()

    def test_a_base_has_a_part_where_it_is_listed(self, family: Family, tmp_path: Path) -> None:
        slices: list[Mapping[int | str, Range]] = [
            {0: (0, 1)},
            {0: (1, 2), 1: (1, 2), "base": (1, 2)},
            {0: (2, 3), "base": (2, 3)},
        ]
        merged = merge(sliced(family, *slices, base=True), tmp_path / "out")
        sources = merged.coefficients.sources
        assert sources == (family[0].name, family[1].name, family.models.base.name)
        for name, rows in merged.coefficients.coefficients.items():
            layer = 0 if "embed" in name else int(name.split(".")[2]) if "layers" in name else 2
            torch.testing.assert_close(rows.sum(0), torch.ones(rows.shape[1]))
            assert rows[1].any() == (layer == 1), name
            assert not (layer == 0 and rows[2].any()), name

    @pytest.mark.parametrize("parameters", [{}, {"include_base": True}, {"sum_to_one": False}])
    def test_layers_of_the_base_alone_are_copied(
        self, family: Family, tmp_path: Path, parameters: dict[str, Any]
    ) -> None:
        ends: Mapping[int | str, Range] = {0: (2, 3), 1: (2, 3), "base": (2, 3)}
        configuration = sliced(family, {"base": (0, 2)}, ends, base=True, **parameters)
        if "include_base" in parameters:
            configuration["parameters"]["calibration"] = str(family.texts[3])
        merged = merge(configuration, tmp_path / "out")
        own = tensors_of(family.models.base)
        first = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(merged.tensors[first], own[first])
        assert len(merged.report["calibration"]) == (3 if "include_base" in parameters else 2)
        assert "fitted" in {entry["outcome"] for entry in merged.entries.values()}

    @pytest.mark.parametrize("both", [True, False])
    def test_tokens_that_a_copied_model_lacks_come_from_the_others(
        self, family: Family, tmp_path: Path, both: bool
    ) -> None:
        """As mergekit has it for models that are merged; a replay has them too."""
        other = tmp_path / "other"
        shutil.copytree(family[1], other)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["alpha"])
        tokenizer.save_pretrained(other)
        ends: Mapping[int | str, Range] = {0: (1, 3), 1: (1, 3)} if both else {1: (1, 3)}
        configuration = sliced(family, {0: (0, 1)}, ends)
        configuration["slices"][1]["sources"][-1]["model"] = str(other)
        configuration["tokenizer"] = {"source": "union"}
        merged = merge(configuration, tmp_path / "out")
        token = AutoTokenizer.from_pretrained(merged.path).convert_tokens_to_ids("alpha")
        name, own = "model.embed_tokens.weight", tokenizer.convert_tokens_to_ids("alpha")
        assert torch.equal(merged.tensors[name][token], tensors_of(other)[name][own])
        configuration["parameters"]["coefficients"] = str(merged.path)
        assert merge(configuration, tmp_path / "again").model_bytes == merged.model_bytes

    def test_a_stack_of_slices_of_one_model_each_is_copied_without_text(
        self, family: Family, tmp_path: Path
    ) -> None:
        configuration = sliced(family, {0: (0, 2)}, {1: (1, 3)}, base=True)
        for entry in configuration["slices"]:
            del entry["sources"][0]["parameters"]
        merged = merge(configuration, tmp_path / "out")
        expected = stack(family, (0, 0), (0, 1), (1, 1), (1, 2), ends=(0, 1))
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
        family: Family,
        tmp_path: Path,
        slices: list[Mapping[int | str, Range]],
        layers: dict[int, tuple[int, ...]],
    ) -> None:
        with leaving_teachers() as found:
            merged = merge(sliced(family, *slices), tmp_path / "out")
        assert merged.load().config.num_hidden_layers == len(layers[0])
        for source, (tokens, hidden) in found.items():
            config = tiny_llama_config(num_hidden_layers=len(layers[source]))
            teacher = make_model(config)
            pairs = [(source, layer) for layer in layers[source]]
            teacher.load_state_dict(stack(family, *pairs, ends=(source, source)))
            expected = before_the_norm(teacher, tokens)
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        assert set(found) == {0, 1}

    def test_a_teacher_of_another_depth_keeps_its_own_forward_pass(
        self, family: Family, tmp_path: Path
    ) -> None:
        """Its rotary base, say, which is not the merged model's."""
        config = tiny_llama_config(
            num_hidden_layers=4, rope_parameters={"rope_type": "default", "rope_theta": 50.0}
        )
        other = save_models(tmp_path, config, count=1, seed=3).models[0]
        configuration = sliced(family, {0: (0, 3), 1: (0, 3)})
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
    def test_settings_of_each_layer_follow_the_layers(
        self, architecture: str, tmp_path: Path
    ) -> None:
        """mergekit's own methods fail here: transformers refuses to save what they leave."""
        models = save_models(tmp_path / "m", ARCHITECTURES[architecture](), count=2)
        texts = tuple(save_calibration(tmp_path, seed=k, offset=16 * k) for k in range(2))
        own = loaded(models.models[0]).config.layer_types
        family = Family(models, texts)
        configuration = sliced(family, {0: (0, 2), 1: (0, 2)}, {0: (1, 2), 1: (1, 2)}, {1: (0, 1)})
        merged = merge(configuration, tmp_path / "out")
        assert merged.load().config.layer_types == [own[0], own[1], own[1], own[0]]

    def test_layers_that_a_model_does_not_have_are_refused(
        self, family: Family, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"slices\[0\]: `layer_range` is \[1, 4\], but .* 3"):
            merge(sliced(family, {0: (0, 3), 1: (1, 4)}), tmp_path / "out")
        short = save_models(
            tmp_path / "short", tiny_llama_config(num_hidden_layers=1), count=1
        ).models[0]
        configuration = sliced(family, {0: (0, 1), 1: (0, 1)}, {0: (1, 3)})
        configuration["slices"][0]["sources"][1]["model"] = str(short)
        with pytest.raises(
            ConfigError, match=r"slices\[1\]: takes layers up to 3 .* has 1, too few"
        ):
            merge(configuration, tmp_path / "out")
        configuration["slices"][0]["sources"][1]["parameters"] = {"loss_weight": 0}
        merge(configuration, tmp_path / "out").load()

    @pytest.mark.parametrize("learns", [True, False])
    def test_a_stack_of_models_of_different_sizes_is_refused(
        self, family: Family, tmp_path: Path, learns: bool
    ) -> None:
        """passthrough writes it, and nothing can load what it writes."""
        config = tiny_llama_config(num_hidden_layers=2, intermediate_size=32)
        wide = save_models(tmp_path / "wide", config, count=1, seed=5).models[0]
        middle: Mapping[int | str, Range] = {0: (1, 2), 1: (1, 2)} if learns else {0: (1, 2)}
        configuration = sliced(family, {0: (0, 1)}, middle, {2: (0, 1)})
        source = configuration["slices"][-1]["sources"][0]
        source["model"] = str(wide)
        source["parameters"]["loss_weight"] = 0
        with pytest.raises(ArchitectureError, match=r"mlp.up_proj.weight(: shapes differ| \[32, )"):
            merge(configuration, tmp_path / "out")

    def test_a_stack_of_models_of_different_vocabularies(
        self, family: Family, tmp_path: Path
    ) -> None:
        config = tiny_llama_config(num_hidden_layers=2, vocab_size=80)
        other = save_models(tmp_path / "other", config, count=1, seed=5).models[0]
        configuration = sliced(family, {0: (0, 2)}, {1: (0, 2)})
        configuration["slices"][1]["sources"][0]["model"] = str(other)
        with pytest.raises(ArchitectureError, match=r"lm_head.weight \[80, 16\], not \[64, 16\]"):
            merge(configuration, tmp_path / "out")
        cut = merge(configuration, tmp_path / "cut", unsafe_truncate_embeddings=True)
        assert cut.load().config.vocab_size == 64
        configuration["tokenizer"] = {"source": "union"}
        assert merge(configuration, tmp_path / "out").load().config.num_hidden_layers == 4

    def test_models_of_different_depth_are_refused(self, family: Family, tmp_path: Path) -> None:
        short = save_models(
            tmp_path / "short", tiny_llama_config(num_hidden_layers=1), count=1
        ).models[0]
        configuration = dam([family[0], short], family.texts)
        with pytest.raises(
            ConfigError, match=r"models: required equally many layers of every model, g"
        ):
            merge(configuration, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_slices_of_a_module(self, family: Family, tmp_path: Path) -> None:
        configuration = sliced(family, {0: (0, 1)}, {0: (1, 3), 1: (1, 3)})
        plain = merge(configuration, tmp_path / "plain")
        configuration["modules"] = {"default": {"slices": configuration.pop("slices")}}
        assert merge(configuration, tmp_path / "out").model_bytes == plain.model_bytes

    def test_a_configuration_that_is_merged_is_left_as_it_was(
        self, family: Family, tmp_path: Path
    ) -> None:
        configuration = sliced(family, {0: (0, 1)}, {0: (1, 3), 1: (1, 3)})
        merged = merge(configuration, tmp_path / "out")
        again = merge(configuration, tmp_path / "again")
        assert again.model_bytes == merged.model_bytes
        written = (merged.path / "mergekit_config.yml").read_text("utf-8")
        assert written.count("layer_range") == 3
