"""Bad models and weights: each is refused before any work is lost."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from mergekit_dam.errors import (
    ArchitectureError,
    CheckpointError,
    ConfigError,
    DamError,
)
from tests.kit.inputs import Inputs
from tests.kit.merging import merge
from tests.kit.models import ARCHITECTURES, tiny_llama_config
from tests.kit.tokenizers import make_tokenizer


class TestModels:
    def test_missing_folder(self, inputs: Inputs) -> None:
        inputs.models[1] = inputs.folder / "nothing"
        inputs.refused(DamError, f"{inputs.models[1]}: required a folder with a model")

    def test_tensors_of_other_shapes(self, inputs: Inputs) -> None:
        model = inputs.other_model(tiny_llama_config(intermediate_size=32))
        inputs.refused(
            ArchitectureError,
            "model.layers.0.mlp.up_proj.weight: shapes differ",
            f"{model} [32, 16]",
            "and 1 more",
        )

    def test_vocabularies_of_other_sizes(self, inputs: Inputs) -> None:
        inputs.other_model(tiny_llama_config(vocab_size=66))
        inputs.refused(
            ArchitectureError,
            "model.embed_tokens.weight: shapes differ",
            "write `tokenizer: {source: union}`, or pass --unsafe-truncate-embeddings",
        )

    def test_missing_tensor(self, inputs: Inputs) -> None:
        model = inputs.own_model()
        file = model / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        message = f"model.layers.1.mlp.up_proj.weight: {model} does not have it"
        inputs.refused(ArchitectureError, message)

    def test_layers_outside_of_a_model(self, inputs: Inputs) -> None:
        configuration = inputs.configuration()
        models = configuration.pop("models")
        configuration["slices"] = [
            {"sources": [{**entry, "layer_range": [1, 3]} for entry in models]}
        ]
        inputs.refused(
            ConfigError,
            f"slices[0]: `layer_range` is [1, 3], but {inputs.models[0]} has ",
            configuration=configuration,
        )

    def test_encoder_and_decoder(self, inputs: Inputs) -> None:
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
            inputs.models[index] = inputs.folder / str(index)
            T5ForConditionalGeneration(config).save_pretrained(inputs.models[index])
            make_tokenizer().save_pretrained(inputs.models[index])
        inputs.refused(
            ArchitectureError,
            "got T5ForConditionalGeneration (model type t5): AutoModelForSeq2SeqLM loads it",
        )

    def test_another_architecture_by_force(self, inputs: Inputs) -> None:
        inputs.other_model(ARCHITECTURES["qwen3"]())
        inputs.options["allow_crimes"] = True
        inputs.refused(
            ArchitectureError,
            "mergekit plans no tensor for model.layers.0.self_attn.q_norm.weight",
            "which Qwen3ForCausalLM needs",
        )

    def test_a_head_of_its_own_beside_a_tied_first_model(self, inputs: Inputs) -> None:
        inputs.other_model(tiny_llama_config(tie_word_embeddings=True), 0)
        inputs.refused(ArchitectureError, f"{inputs.models[1]} has an output head of its own")


class TestWeights:
    """Errors that only show when weights are read; they name the model and the tensor too."""

    @pytest.fixture(params=[float("nan"), float("inf")])
    def broken(self, inputs: Inputs, request: pytest.FixtureRequest) -> Callable[[str], None]:
        def break_tensor(name: str) -> None:
            file = inputs.own_model() / "model.safetensors"
            tensors = load_file(file)
            tensors[name][-1, 0] = request.param
            save_file(tensors, file, metadata={"format": "pt"})

        return break_tensor

    @pytest.mark.parametrize("objective", ["layer", "layer, in the metric", "logits", "replay"])
    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.mlp.down_proj.weight",
            "lm_head.weight",
        ],
    )
    def test_that_are_not_finite(
        self, inputs: Inputs, broken: Callable[[str], None], name: str, objective: str
    ) -> None:
        own = {
            "layer": {},
            "layer, in the metric": {"metric": "sensitivity"},
            "logits": {"objective": "logits"},
            "replay": {"coefficients": str(inputs.folder / "first"), "changed_models": "allow"},
        }[objective]
        if objective == "replay":
            merge(inputs.configuration(), inputs.folder / "first")
        broken(name)
        with pytest.raises(CheckpointError) as error:
            merge(inputs.configuration(**own), inputs.folder / "out")
        said = f"{inputs.models[1]}: {name} has 1 values that are not finite"
        assert error.value.message.startswith(said)
        assert not (inputs.folder / "out").exists()

    def test_a_ridge_too_small_to_solve_with(self, inputs: Inputs) -> None:
        configuration = inputs.configuration(ridge=1e-300, sum_to_one=False)
        with pytest.raises(DamError, match=r"block 1/2: .*`ridge` is too small"):
            merge(configuration, inputs.folder / "out")

    def test_of_an_earlier_merge_stay_when_the_next_fails(self, inputs: Inputs) -> None:
        out = inputs.folder / "out"
        first = merge(inputs.configuration(), out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        (out / "notes.txt").write_text("mine")
        with pytest.raises(DamError):
            merge(inputs.configuration(ridge=1e-300, sum_to_one=False), out)
        assert {path.name for path in out.iterdir()} == {*before, "notes.txt"}
        assert first.model_bytes == before["model.safetensors"]

    def test_that_need_more_memory_than_a_gpu_has(self, inputs: Inputs) -> None:
        """torch's own error, which a machine without a GPU does not raise."""
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs")
        with (
            mock.patch("mergekit_dam.layers.fit.walk_part", side_effect=error),
            pytest.raises(DamError, match=r"Tried to allocate 2 GiB\..*`gpu_memory`") as raised,
        ):
            merge(inputs.configuration(), inputs.folder / "out")
        assert "See the docs" not in raised.value.message
        assert not (inputs.folder / "out").exists()
