"""Loss and gradient of the streamed objective against autograd of the whole network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_dam.search.gradient import Objective
from mergekit_dam.streams import stream as streams_module
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.counting import token_weights
from tests.kit.autograd import assert_equal_gradients, check_gradients, plain
from tests.kit.models import tiny_llama_config
from tests.kit.networks import files_under, make
from tests.kit.settings import logits_settings
from tests.kit.tensors import LENGTH, counted_of

TERMS: dict[str, dict[str, Any]] = {
    "kl": {},
    "kl at 2": {"temperature": 2.0},
    "mse": {"mse": 0.7},
    "entropy": {"entropy": 0.3},
    "all": {"temperature": 1.5, "mse": 0.2, "entropy": 0.4},
}
TINY = ("llama", "llama-tied", "qwen2", "gpt2", "gemma2", "gemma3")


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", TINY)
def test_loss_and_gradient_are_those_of_the_whole_network(
    name: str, term: str, tmp_path: Path
) -> None:
    check_gradients(make(name), tmp_path, **TERMS[term])


@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_a_base_has_coefficients_and_gradients_too(
    name: str, sum_to_one: bool, tmp_path: Path
) -> None:
    made = make(name, base=True, sum_to_one=sum_to_one)
    check_gradients(made, tmp_path)
    assert all(rows.shape[0] == 3 for rows in made.point().coefficients.values())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_one_coefficient_a_tensor(name: str, tmp_path: Path) -> None:
    made = make(name, granularity="tensor")
    check_gradients(made, tmp_path)
    assert {own.columns for own in made.coordinates.values()} == {1}


def test_biases_of_blocks(tmp_path: Path) -> None:
    config = tiny_llama_config(attention_bias=True, mlp_bias=True)
    check_gradients(make(config=config, models=3, base=True), tmp_path)


def test_a_model_without_a_loss_weight_counts_for_nothing(tmp_path: Path) -> None:
    made = make()
    check_gradients(made, tmp_path, batches=made.batches(weights=(1.0, 0.0)))


@pytest.mark.parametrize("term", ["kl", "all"])
def test_a_token_that_does_not_count_has_no_loss(term: str, tmp_path: Path) -> None:
    made = make()
    batches = [
        replace(own, weights=token_weights(counted_of(3, seed=own.source), 0))
        for own in made.batches(sequences=3)
    ]
    check_gradients(made, tmp_path, batches=batches, **TERMS[term])


def test_sequences_that_run_in_several_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "CHUNK_TOKENS", 2 * LENGTH)
    made = make()
    check_gradients(made, tmp_path, batches=made.batches(sequences=5))


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_of_these_models_has_coefficients(name: str) -> None:
    """Columns of a linear run along its input: the first axis where it is transposed."""
    made = make(name)
    coordinates = made.coordinates
    assert coordinates.keys() == made.weights[0].keys()
    for full, own in coordinates.items():
        shape = made.weights[0][full].shape
        assert own.columns == (1 if own.kind == "bias" else shape[own.axis]), full
        transposed = name == "gpt2" and own.kind == "linear"
        assert own.axis == (0 if transposed else -1), full


@pytest.mark.parametrize("off", ["norms", "embeddings", "head"])
def test_tensors_that_are_switched_off_have_no_coefficients(off: str, tmp_path: Path) -> None:
    switched: dict[str, Any] = {off: False}
    made = make(**switched)
    coordinates = made.coordinates
    assert {"norms": "norm", "embeddings": "embedding", "head": "head"}[off] not in {
        own.kind for own in coordinates.values()
    }
    check_gradients(made, tmp_path)


def test_tensors_that_all_sources_agree_on_are_left_alone() -> None:
    made = make()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        made.sources[1].get_parameter(name).copy_(made.sources[0].get_parameter(name))
    assert made.weights[0].keys() - made.coordinates.keys() == {name}


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_weights_that_stay_and_weights_that_are_read_again_give_the_same_bytes(
    name: str, tmp_path: Path
) -> None:
    made = make(name, base=True)
    point, batches, coordinates = made.point(), made.batches(), made.coordinates
    always, never = made.network("always"), made.network("never")
    found = []
    for network in (always, never):
        boundaries = BoundaryStates(tmp_path / network.resident)
        objective = Objective(network, coordinates, logits_settings(), boundaries)
        found += [objective(point, batches), objective(point, batches)]
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert all(gradients[n].equal(gradient) for n, gradient in found[0][1].items())
    assert all(always.keeps_on_device(number) for number in range(len(always.stages)))
    assert not any(never.keeps_on_device(number) for number in range(len(never.stages)))
    always.release()
    assert not any(always.keeps_on_device(number) for number in range(len(always.stages)))


@pytest.mark.parametrize("resident", ["always", "never"])
def test_the_gradient_is_that_of_the_point_it_is_asked_at(resident: Any, tmp_path: Path) -> None:
    """Whatever was kept of the point before."""
    made, settings = make(), logits_settings()
    batches = made.batches()
    objective = Objective(
        made.network(resident), made.coordinates, settings, BoundaryStates(tmp_path)
    )
    objective(made.point(seed=1), batches)
    point = made.point(seed=2)
    loss, gradients = objective(point, batches)
    expected_loss, expected = plain(made, point, batches, settings)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_equal_gradients(gradients, expected)


@pytest.mark.parametrize(
    ("dtype", "written"),
    [(torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_weights_are_run_as_they_are_written(
    dtype: torch.dtype, written: torch.dtype | None, tmp_path: Path
) -> None:
    """Weights are rounded as they are written; gradients are those at the rounded weights."""
    made = make(dtype=dtype, written=written)
    check_gradients(made, tmp_path)
    point, batches = made.point(), made.batches()
    rounded, _ = plain(made, point, batches, logits_settings())
    made.written = torch.float32
    exact, _ = plain(made, point, batches, logits_settings())
    assert (rounded == exact) == (written == torch.float32)


def test_the_files_hold_the_inputs_of_all_blocks_and_nothing_else(tmp_path: Path) -> None:
    made = make()
    objective = Objective(
        made.network(), made.coordinates, logits_settings(), BoundaryStates(tmp_path)
    )
    objective(made.point(), made.batches(sequences=2))
    objective(made.point(), made.batches(sequences=2))
    assert len(files_under(tmp_path)) == len(made.decoder.blocks)
    size = 2 * 2 * LENGTH * 16 * 4
    for file in tmp_path.iterdir():
        assert size <= file.stat().st_size < size + 1000
