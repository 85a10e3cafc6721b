"""Bad models and weights: each is refused before any work is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from mergekit_dam.errors import ArchitectureError, CalibrationError, ConfigError, DamError
from tests.kit.cases import Case
from tests.kit.merging import merge
from tests.kit.models import ARCHITECTURES, make_tokenizer, tiny_llama_config


class TestModels:
    def test_missing_folder(self, case: Case) -> None:
        case.models[1] = case.folder / "nothing"
        case.refused(CalibrationError, f"the tokenizer of {case.models[1]} cannot be loaded")

    def test_tensors_of_other_shapes(self, case: Case) -> None:
        model = case.other_model(tiny_llama_config(intermediate_size=32))
        case.refused(
            ArchitectureError,
            "model.layers.0.mlp.up_proj.weight: shapes differ",
            f"{model} [32, 16]",
            "and 1 more",
        )

    def test_vocabularies_of_other_sizes(self, case: Case) -> None:
        case.other_model(tiny_llama_config(vocab_size=66))
        case.refused(
            ArchitectureError,
            "model.embed_tokens.weight: shapes differ",
            "write `tokenizer: {source: union}`, or pass --unsafe-truncate-embeddings",
        )

    def test_missing_tensor(self, case: Case) -> None:
        model = case.own_model()
        file = model / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        message = f"model.layers.1.mlp.up_proj.weight: {model} has not"
        case.refused(ArchitectureError, message)

    def test_layers_outside_of_a_model(self, case: Case) -> None:
        configuration = case.configuration()
        models = configuration.pop("models")
        configuration["slices"] = [
            {"sources": [{**entry, "layer_range": [1, 3]} for entry in models]}
        ]
        case.refused(
            ConfigError,
            f"slices[0]: `layer_range` is [1, 3], but {case.models[0]} has ",
            configuration=configuration,
        )

    def test_encoder_and_decoder(self, case: Case) -> None:
        config = T5Config(
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
        for index in range(2):
            torch.manual_seed(index)
            case.models[index] = case.folder / str(index)
            T5ForConditionalGeneration(config).save_pretrained(case.models[index])
            make_tokenizer().save_pretrained(case.models[index])
        case.refused(
            ArchitectureError,
            "got T5ForConditionalGeneration (model type t5): AutoModelForSeq2SeqLM loads it",
        )

    def test_another_architecture_by_force(self, case: Case) -> None:
        case.other_model(ARCHITECTURES["qwen3"]())
        case.options["allow_crimes"] = True
        case.refused(
            ArchitectureError,
            "mergekit plans no tensor for model.layers.0.self_attn.q_norm.weight",
            "which Qwen3ForCausalLM needs",
        )

    def test_a_head_of_its_own_beside_a_tied_first_model(self, case: Case) -> None:
        case.other_model(tiny_llama_config(tie_word_embeddings=True), 0)
        case.refused(ArchitectureError, f"{case.models[1]} has an output head of its own")


class TestWeights:
    """What only shows when weights are read; the tensor or the block is named all the same."""

    @pytest.fixture(params=[float("nan"), float("inf")])
    def broken(self, case: Case, request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
        def break_tensor(name: str) -> None:
            file = case.own_model() / "model.safetensors"
            tensors = load_file(file)
            tensors[name][0, 0] = request.param
            save_file(tensors, file, metadata={"format": "pt"})

        yield break_tensor

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("model.layers.0.self_attn.q_proj.weight", "block 1/2"),
            ("model.layers.1.mlp.down_proj.weight", "block 2/2"),
            ("lm_head.weight", "output: lm_head.weight: required a finite loss"),
        ],
    )
    def test_that_are_not_finite(
        self, case: Case, broken: Callable[[str], None], name: str, place: str
    ) -> None:
        broken(name)
        with pytest.raises(DamError, match="not finite") as error:
            merge(case.configuration(head=True), case.folder / "out")
        assert place in error.value.message
        assert not (case.folder / "out").exists()

    @pytest.mark.parametrize("objective", ["layer", "logits"])
    @pytest.mark.parametrize(
        ("name", "place"),
        [("model.layers.1.mlp.down_proj.weight", "block 2/2"), ("lm_head.weight", "output")],
    )
    def test_that_are_not_finite_in_a_search(
        self, case: Case, broken: Callable[[str], None], name: str, place: str, objective: str
    ) -> None:
        broken(name)
        more = {"metric": "sensitivity"} if objective == "layer" else {}
        with pytest.raises(DamError, match=f"^{place}: what leaves it is not finite"):
            merge(case.configuration(objective=objective, **more), case.folder / "out")
        assert not (case.folder / "out").exists()

    def test_a_ridge_too_small_to_solve_with(self, case: Case) -> None:
        configuration = case.configuration(ridge=1e-300, sum_to_one=False)
        with pytest.raises(DamError, match=r"block 1/2: .*`ridge` is too small"):
            merge(configuration, case.folder / "out")

    def test_of_an_earlier_merge_stay_when_the_next_fails(self, case: Case) -> None:
        out = case.folder / "out"
        first = merge(case.configuration(), out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        (out / "notes.txt").write_text("mine")
        with pytest.raises(DamError):
            merge(case.configuration(ridge=1e-300, sum_to_one=False), out)
        assert {path.name for path in out.iterdir()} == {*before, "notes.txt"}
        assert first.model_bytes == before["model.safetensors"]
