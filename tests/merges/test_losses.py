"""The report's held-out losses, against the same measured with transformers alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.kit.merging import HELD_OUT, SAMPLES, Merged
from tests.kit.models import Models
from tests.kit.tensors import kl
from tests.kit.texts import Calibration, calibration_tokens
from tests.kit.tokenizers import make_tokenizer


class Run:
    """Outputs of all modules, and the streams behind the blocks, of one forward pass."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.streams: dict[int, Tensor] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, tokens: Tensor) -> "Run":
        run = cls()
        handles = []
        for name, module in model.named_modules():

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    run.outputs[name] = output.clone()

            handles.append(module.register_forward_hook(keep))
        model(tokens)
        for handle in handles:
            handle.remove()
        run.streams = {layer: run.outputs[f"model.layers.{layer}"] for layer in (0, 1)}
        return run


@pytest.fixture(scope="module")
def runs(merged: Merged, llama_models: Models, calibration: Calibration) -> list[tuple[Run, Run]]:
    """(teacher, merged model) on the held-out text of each model."""
    output = merged.load()
    return [
        (Run.of(AutoModelForCausalLM.from_pretrained(model), held_out), Run.of(output, held_out))
        for model, text in zip(llama_models.models, calibration, strict=True)
        for held_out in [calibration_tokens(text, make_tokenizer(), samples=SAMPLES)[-HELD_OUT:]]
    ]


ONE_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Linears that share an input are fitted together, with the same weights of tokens."""


class TestLosses:
    """The report's held-out losses against the same measured with transformers alone."""

    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize(
        "unit",
        [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "input_layernorm",
            "post_attention_layernorm",
        ],
    )
    def test_inside_a_block_is_the_distance_to_the_teachers_output(
        self, merged: Merged, runs: list[tuple[Run, Run]], layer: int, unit: str
    ) -> None:
        name = f"model.layers.{layer}.{unit}"
        parent, _, last = name.rpartition(".")
        group = next((g for g in ONE_INPUT if last in g), (last,))
        expected = [
            distance(
                teacher.outputs[name] - own.outputs[name],
                teacher.outputs[name],
                weights([teacher.outputs[f"{parent}.{member}"] for member in group]),
            )
            for teacher, own in runs
        ]
        assert loss_of(merged, name) == pytest.approx(sum(expected) / 2, rel=1e-3)

    @pytest.mark.parametrize("layer", [0, 1])
    def test_at_the_end_of_a_block_is_the_distance_of_the_streams(
        self, merged: Merged, runs: list[tuple[Run, Run]], layer: int
    ) -> None:
        name = f"model.layers.{layer}.mlp.down_proj"
        expected = [
            distance(
                teacher.streams[layer] - own.streams[layer],
                teacher.outputs[name],
                # The output that would bring the merged stream onto the teacher's.
                weights([teacher.streams[layer] - own.streams[layer] + own.outputs[name]]),
            )
            for teacher, own in runs
        ]
        assert loss_of(merged, name) == pytest.approx(sum(expected) / 2, rel=1e-3)

    def test_of_the_final_norm_is_the_distance_to_the_teachers(
        self, merged: Merged, runs: list[tuple[Run, Run]]
    ) -> None:
        name = "model.norm"
        expected = [
            distance(
                teacher.outputs[name] - own.outputs[name],
                teacher.outputs[name],
                weights([teacher.outputs[name]]),
            )
            for teacher, own in runs
        ]
        assert loss_of(merged, name) == pytest.approx(sum(expected) / 2, rel=1e-3)

    def test_of_the_embedding_counts_every_token_alike(
        self, merged: Merged, runs: list[tuple[Run, Run]]
    ) -> None:
        name = "model.embed_tokens"
        expected = [
            distance(
                teacher.outputs[name] - own.outputs[name],
                teacher.outputs[name],
                torch.ones(teacher.outputs[name].shape[:2]),
            )
            for teacher, own in runs
        ]
        assert loss_of(merged, name) == pytest.approx(sum(expected) / 2, rel=1e-3)

    def test_of_the_head_is_the_divergence_of_the_distributions(
        self, merged: Merged, runs: list[tuple[Run, Run]]
    ) -> None:
        expected = [kl(teacher.outputs["lm_head"], own.outputs["lm_head"]) for teacher, own in runs]
        assert loss_of(merged, "lm_head") == pytest.approx(sum(expected) / 2, rel=1e-3)


def weights(targets: Sequence[Tensor]) -> Tensor:
    """Of every token: one, but less where its targets exceed the median of its sequence."""
    excess = []
    for target in targets:
        energies = target.square().sum(-1)
        median = energies.sort(dim=1).values[:, (energies.shape[1] - 1) // 2]
        excess.append(energies / median[:, None])
    return 1 / torch.stack(excess).mean(0).clamp(min=1)


def distance(error: Tensor, output: Tensor, weight: Tensor) -> float:
    """Energy of an error as a fraction of the output's, tokens weighted."""
    energies = [(weight.double() * x.double().square().sum(-1)).sum() for x in (error, output)]
    return float(energies[0] / energies[1])


def loss_of(merged: Merged, unit: str) -> float:
    entry = merged.entries[f"{unit}.weight"]
    which = "fitted" if entry["outcome"] == "fitted" else "start"
    loss: float = entry[f"held_out_{which}"]
    return loss
