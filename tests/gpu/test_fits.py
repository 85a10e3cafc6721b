"""Every stage of a fit on a GPU: repeated, against a CPU, and under its limits."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mergekit_dam.reports.schema import DamReport
from mergekit_dam.streams import storage
from tests.kit.fit_parameters import FITS, SIZES
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import ARCHITECTURES, Models, save_models, tiny_llama_config
from tests.kit.processes import finish, start_merges
from tests.kit.texts import Calibration, save_calibration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BOUNDS = {"columns": 1e-3, "low rank": 2e-2, "logits": 1e-3}
"""How far merged tensors in fp32 may be from those of a CPU, in norms of the tensor.

A correction may stop at another rank or ridge where two are alike on held-out text.
"""


def merged(
    models: Models, texts: Calibration, out: Path, *, on: torch.device | str, **own: Any
) -> Merged:
    configuration = dam(models.models, texts, base=models.base, **{**SIZES, **own})
    return merge(configuration, out, device=str(on))


@pytest.mark.parametrize("fit", FITS)
def test_two_fits_give_the_same_bytes(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path, fit: str
) -> None:
    """With half precision in the blocks, as by default."""
    first, second = (merged(models, texts, tmp_path / n, on=gpu, **FITS[fit]) for n in "ab")
    assert first.coefficient_bytes == second.coefficient_bytes
    assert first.model_bytes == second.model_bytes
    assert first.report["this_run"]["peak_memory_bytes"][f"{gpu}:0"]


def test_gradients_of_long_sequences_are_the_same_twice(gpu: torch.device, tmp_path: Path) -> None:
    """Attention adds up gradients in pieces of a sequence; the shorter ones above are one piece."""
    length = 1024
    config = tiny_llama_config(hidden_size=128, max_position_embeddings=length)
    long = save_models(tmp_path / "models", config, count=2)
    first_text, second_text = (
        save_calibration(tmp_path, seed=seed, documents=200) for seed in (0, 1)
    )
    texts = (first_text, second_text)
    own = {"objective": "layer", "samples": 4, "sequence_length": length}
    first, second = (merged(long, texts, tmp_path / name, on=gpu, **own) for name in "ab")
    assert first.model_bytes == second.model_bytes


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2", "phi3", "mixtral"])
def test_every_kind_of_unit_is_fitted_on_a_gpu(
    texts: Calibration, gpu: torch.device, tmp_path: Path, name: str
) -> None:
    """Tied heads, biases, transposed and fused linears, norms of a block's end, experts."""
    own = save_models(tmp_path / "models", ARCHITECTURES[name](), count=2)
    for fit in ("sensitivity, full", "default"):
        found = merged(own, texts, tmp_path / fit, on=gpu, **{**FITS[fit], "sequence_length": 16})
        assert {entry["outcome"] for entry in found.report["tensors"]} & {
            "fitted",
            "fitted end to end",
        }


@pytest.mark.parametrize("fit", BOUNDS)
def test_in_fp32_a_gpu_finds_what_a_cpu_finds(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path, fit: str
) -> None:
    own = {**FITS[fit], "forward_dtype": "float32"}
    here = merged(models, texts, tmp_path / "gpu", on=gpu, **own)
    there = merged(models, texts, tmp_path / "cpu", on="cpu", **own)
    for name, tensor in there.tensors.items():
        gap = (here.tensors[name] - tensor).norm() / tensor.norm()
        assert gap < BOUNDS[fit], f"{name}: {gap:.1e}"


@pytest.mark.parametrize("fit", FITS)
def test_half_precision_costs_little(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path, fit: str
) -> None:
    """On held-out text. Weights may be further apart, where two corrections are about as good."""
    half, full = (
        held_out(merged(models, texts, tmp_path / dtype, on=gpu, forward_dtype=dtype, **FITS[fit]))
        for dtype in ("bfloat16", "float32")
    )
    assert half < 1.03 * full


def held_out(found: Merged) -> float:
    """The KL of the whole model on held-out text, or the mean of its tensors' losses there."""
    if found.report["search"]:
        return min(float(trial["mean_held_out_kl"]) for trial in found.report["search"])
    report = DamReport.model_validate(found.report)
    losses = [own.held_out_after for own in report.tensors if own.held_out_after is not None]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("fit", ["low rank", "default"])
def test_a_replay_on_a_cpu_has_the_bytes_of_the_gpu(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path, fit: str
) -> None:
    """Nothing is rounded when the models are saved: their dtype is fp32."""
    fitted = merged(models, texts, tmp_path / "fit", on=gpu, **FITS[fit])
    replay = dam(models.models, base=models.base)
    replay["parameters"] = {"coefficients": str(fitted.path)}
    for device in ("cpu", str(gpu)):
        again = merge(replay, tmp_path / device, device=device)
        assert again.model_bytes == fitted.model_bytes, device


@pytest.mark.parametrize("place", ["host", "disk"])
def test_where_streams_are_kept_does_not_matter(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path, place: str
) -> None:
    kept, elsewhere = (
        merged(models, texts, tmp_path / where, on=gpu, stream_offload=where, **FITS["default"])
        for where in ("device", place)
    )
    assert elsewhere.model_bytes == kept.model_bytes


def test_streamed_weights_give_the_bytes_of_resident_ones(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path
) -> None:
    kept, streamed = (
        merged(models, texts, tmp_path / way, on=gpu, resident=way, **FITS["default"])
        for way in ("always", "never")
    )
    assert streamed.model_bytes == kept.model_bytes


@pytest.mark.parametrize("fit", ["low rank", "sensitivity", "sensitivity, full", "default"])
def test_what_is_on_the_host_between_its_uses_gives_the_bytes_of_the_gpu(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path, fit: str
) -> None:
    """Blocks, sums and metrics, as where they would fill too much of the GPU's memory."""
    here = merged(models, texts, tmp_path / "here", on=gpu, **FITS[fit])
    with mock.patch.object(storage, "IDLE", 0.0):
        there = merged(models, texts, tmp_path / "there", on=gpu, **FITS[fit])
    assert there.model_bytes == here.model_bytes


def test_a_fit_keeps_to_the_memory_that_it_may_use(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path
) -> None:
    limit = 2**28
    torch.cuda.reset_peak_memory_stats()
    found = merged(
        models, texts, tmp_path / "out", on=gpu, gpu_memory=str(limit), **FITS["default"]
    )
    assert 0 < found.report["this_run"]["peak_memory_bytes"][f"{gpu}:0"] < limit


def test_two_processes_share_a_gpu(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path
) -> None:
    """They add up on the host: NCCL takes one device per process."""
    configuration = dam(models.models, texts, base=models.base, **{**SIZES, **FITS["default"]})
    alone = merge(configuration, tmp_path / "alone", device=str(gpu))
    finish(start_merges({"shared": configuration}, tmp_path / "two", device=str(gpu)))
    shared = Merged(tmp_path / "two" / "shared")
    assert abs(held_out(shared) / held_out(alone) - 1) < 0.03
    for name, tensor in alone.tensors.items():
        assert (shared.tensors[name] - tensor).norm() < BOUNDS["low rank"] * tensor.norm(), name
