"""Merges on a device that is made up: what a GPU would refuse, wait for, or have no room for."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit.estimates import ROOM, inventory, planned_estimate
from tests.kit.fit_parameters import FITS, SIZES
from tests.kit.made_up_merges import Job, merged_there
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import ARCHITECTURES, Models, save_models, tiny_llama_config
from tests.kit.texts import Calibration, save_calibration

pytestmark = pytest.mark.slow


NEAR = {"identity": 1e-5, "sensitivity": 1e-2}
"""How far a merged tensor may be from that of the CPU, in its norm, by metric. Attention is made
in another way, and metrics are of labels that are drawn from what it gives."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    config = tiny_llama_config(hidden_size=64, intermediate_size=160)
    return save_models(tmp_path_factory.mktemp("models"), config)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder = tmp_path_factory.mktemp("texts")
    more = {"documents": 400}
    return (
        save_calibration(folder, seed=0, **more),
        save_calibration(folder, seed=1, offset=24, **more),
    )


def test_every_fit_runs_on_a_device_and_finds_what_the_host_finds(
    models: Models, texts: Calibration, tmp_path: Path
) -> None:
    """Tensors that are on the wrong device would be refused."""
    fits = {
        name: dam(models.models, texts, base=models.base, **{**SIZES, **own})
        for name, own in FITS.items()
    }
    merged_there([Job(own, str(tmp_path / name)) for name, own in fits.items()], tmp_path)
    for name, configuration in fits.items():
        expected = merge(configuration, tmp_path / f"{name} on the host").tensors
        found = Merged(tmp_path / name).tensors
        for tensor, there in expected.items():
            near = NEAR[FITS[name].get("metric", "identity")] * there.norm()
            assert (found[tensor] - there).norm() < near, (name, tensor)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "phi3", "mixtral"])
def test_every_kind_of_unit_is_fitted_on_a_device(
    texts: Calibration, tmp_path: Path, architecture: str
) -> None:
    """Biases, transposed and fused linears, norms of a block's end, experts."""
    own = save_models(tmp_path / "models", ARCHITECTURES[architecture](), count=2)
    small = {"samples": 4, "sequence_length": 16}
    fit = {**FITS["default"], **small, "correction_rank": 2}
    configuration = dam(own.models, texts, base=own.base, **fit)
    merged_there([Job(configuration, str(tmp_path / "out"))], tmp_path)
    expected = merge(configuration, tmp_path / "expected").tensors
    for name, tensor in Merged(tmp_path / "out").tensors.items():
        near = NEAR["sensitivity"] * expected[name].norm()
        assert (tensor - expected[name]).norm() < near, name


def test_it_does_not_matter_where_tensors_wait_for_their_use(
    models: Models, texts: Calibration, tmp_path: Path
) -> None:
    """On a device of little memory, blocks, sums and metrics are on the host between their uses."""
    configurations = {
        name: dam(models.models, texts, base=models.base, **{**SIZES, **FITS[name]})
        | {"dtype": "bfloat16"}
        for name in ("low rank", "sensitivity", "default")
    }
    for own in configurations.values():
        own["parameters"]["forward_dtype"] = "bfloat16"
    roomy = [Job(own, str(tmp_path / name)) for name, own in configurations.items()]
    scarce = [Job(own, f"{tmp_path / name} small", 100) for name, own in configurations.items()]
    runs = merged_there([*roomy, *scarce], tmp_path)
    for index, name in enumerate(configurations):
        here, there = Merged(tmp_path / name), Merged(tmp_path / f"{name} small")
        assert here.model_bytes == there.model_bytes
        assert here.coefficient_bytes == there.coefficient_bytes
        assert runs[index + len(roomy)].peak < runs[index].peak


def test_the_host_waits_no_oftener_for_more_text(
    models: Models, texts: Calibration, tmp_path: Path
) -> None:
    """Sums over chunks are not read while they grow; outputs of a fit are read once per tensor."""
    fit = {"sequence_length": 64, "stream_offload": "device", **FITS["sensitivity"]}
    fit["head"] = False  # its descent takes more steps on more text
    jobs = [
        Job(dam(models.models, texts, base=models.base, samples=n, **fit), str(tmp_path / str(n)))
        for n in (40, 120)  # one chunk of 2048 tokens per model and split; three
    ]
    few, many = (
        Counter({w: n for w, n in run.waits.items() if w.startswith(("fitting/", "layers/"))})
        for run in merged_there(jobs, tmp_path)
    )
    assert few.total() > 0
    assert {where: (few[where], n) for where, n in many.items() if n > few[where]} == {}


@pytest.mark.parametrize(
    ("metric", "memory"),
    [("identity", 10**9), ("sensitivity", 10**9), ("sensitivity", 10**11)],
    ids=["identity", "scarce", "plenty"],
)
def test_a_fit_takes_the_memory_that_is_planned(
    texts: Calibration, tmp_path: Path, metric: str, memory: int
) -> None:
    """The real code runs on tensors that have shapes alone."""
    config = tiny_llama_config(
        hidden_size=1024, intermediate_size=3584, num_attention_heads=8, num_key_value_heads=2
    )
    wide = save_models(tmp_path / "wide", config, count=2, dtype=torch.bfloat16)
    small = save_models(tmp_path / "small", tiny_llama_config(), count=2)
    fit: dict[str, Any] = {"metric": metric, "correction": "low_rank"}
    fit |= {"samples": 32, "sequence_length": 64}
    fit |= {"embeddings": False, "head": False, "forward_dtype": "bfloat16"}
    fit |= {"stream_offload": "host"}
    configuration = dam(wide.models, texts, base=wide.base, **fit) | {"dtype": "bfloat16"}
    alike = dam(small.models, texts, base=small.base)
    (run,) = merged_there([Job(configuration, str(tmp_path / "out"), memory, alike)], tmp_path)
    made = planned_estimate(inventory(tmp_path, configuration), replace(ROOM, gpu=memory))
    planned = max(need.device for need in made.needs if need.phase == "fit of a block")
    assert 0.75 * planned < run.peak < 1.02 * planned, (run.at_peak, run.peak, planned)
